"""The catalogue's format: what is older is brought up to date at the start, what is newer is refused."""

import uuid
from functools import partial
from typing import Final

from storage.state import rows
from storage.state.catalogue import Batch, Catalogue
from storage.state.kv import Transaction
from storage.state.model import decode_instance

FORMAT: Final = 3  # 1: 0.1, without a number; 2: lineage, series -> study, several patients; 3: a log beside it
ROWS_AT_ONCE: Final = 2000


class FormatUnknown(OSError):
    """A newer version has written it."""

    def __init__(self, found: int) -> None:
        super().__init__(0, f"the catalogue has format {found}, this version knows up to {FORMAT}: install a newer one")


def bring_up_to_date(catalogue: Catalogue, cluster_id: str) -> None:
    """Raises FormatUnknown, OSError."""
    found = int(catalogue.meta("format", 1))
    if found > FORMAT:
        raise FormatUnknown(found)
    if found == FORMAT:
        return
    facts: dict[str, object] = {"format": FORMAT}
    if catalogue.epochs.last[1] and not catalogue.meta("lineage", ""):
        # Both nodes of a pair hold one log and must give it the same name.
        facts["lineage"] = f"1-{cluster_id}" if cluster_id else str(uuid.uuid4())
    if found == 1 and catalogue.counts()["instances"]:
        _join_all(catalogue)
    catalogue.write(Batch(meta=facts))


def _join_all(catalogue: Catalogue) -> None:
    """The rows above each instance, in pieces: a process that ends meanwhile begins anew."""
    at = b""
    while True:
        last = catalogue.kv.update(partial(_join_some, start=at))
        if last is None:
            return
        at = last + b"\0"


def _join_some(txn: Transaction, start: bytes) -> bytes | None:
    found = []
    for key, value in txn.scan("instance", start):
        found.append((key, value))
        if len(found) >= ROWS_AT_ONCE:
            break
    for _, value in found:
        put = decode_instance(value).put
        rows.join(txn, put)
        txn.put("series_study", f"{put.series}\0{put.study}".encode(), b"")
    return found[-1][0] if found else None
