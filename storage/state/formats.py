"""The catalogue's format: what is older is brought up to date at the start, what is newer is refused."""

import uuid
from functools import partial
from itertools import islice
from typing import Final

import structlog

from storage.state import entries, indexes, instances, places, rows
from storage.state.catalogue import FORMAT, Batch, Catalogue
from storage.state.entries import seq_key
from storage.state.kv import Transaction, in_steps
from storage.state.model import Put, Void, decode_entry

log = structlog.get_logger()

ROWS_AT_ONCE: Final = 2000
PLACED: Final = 5  # what is older has its rows converted


class FormatUnknown(OSError):
    """A newer version has written it."""

    def __init__(self, found: int) -> None:
        super().__init__(0, f"the catalogue has format {found}, this version knows up to {FORMAT}: install a newer one")


def bring_up_to_date(catalogue: Catalogue, cluster_id: str) -> None:
    """A process that ends meanwhile begins anew. Raises FormatUnknown, OSError."""
    found = int(catalogue.meta("format", 1))
    if found > FORMAT:
        raise FormatUnknown(found)
    found = int(catalogue.meta("converting", 0)) or found
    if found == FORMAT:
        if catalogue.meta("index_rules", "") != indexes.RULES:
            _index(catalogue)
        return
    catalogue.write(Batch(meta={"converting": found, "format": FORMAT}))  # what is half converted no older one may have
    if catalogue.epochs.last[1]:  # a new one is empty
        log.info("catalogue.converting", format=found, to=FORMAT)
    facts: dict[str, object] = {"converting": 0}
    if found < PLACED:
        facts["undescribed"] = catalogue.epochs.last[1] > 0
    if catalogue.epochs.last[1] and not catalogue.meta("lineage", ""):
        # Both nodes of a pair hold one log and must give it the same name.
        facts["lineage"] = f"1-{cluster_id}" if cluster_id else str(uuid.uuid4())
    if found < PLACED:
        _convert(catalogue, found)
    _index(catalogue)
    catalogue.write(Batch(meta=facts))


def _index(catalogue: Catalogue) -> None:
    """Anew, all of it: other rules may find other things."""
    log.info("catalogue.indexing", rules=indexes.RULES)
    catalogue.write(Batch(meta={"index_rules": ""}))
    rows.index_anew(catalogue.kv)
    catalogue.write(Batch(meta={"index_rules": indexes.RULES}))


def _convert(catalogue: Catalogue, found: int) -> None:
    if found == 1:
        in_steps(catalogue.kv, _join_some)
    in_steps(catalogue.kv, _fold_some)
    in_steps(
        catalogue.kv, partial(_shrink_some, applied=int(catalogue.meta("applied", 0)), last=catalogue.epochs.last[1])
    )
    in_steps(catalogue.kv, _place_some)
    catalogue.kv.update(places.count_anew)
    catalogue.kv.update(lambda txn: entries.note_end(txn, catalogue.epochs))


def _join_some(txn: Transaction, start: bytes) -> bytes | None:
    """The rows above each instance."""
    found = list(islice(txn.scan("instance", start), ROWS_AT_ONCE))
    for _, value in found:
        put = instances.decode_old(value).put
        rows.join(txn, put)
        txn.put("series_study", f"{put.series}\0{put.study}".encode(), b"")
    return found[-1][0] if found else None


def _fold_some(txn: Transaction, start: bytes) -> bytes | None:
    """Rows by what differs within a series."""
    found = list(islice(txn.scan("instance", start), ROWS_AT_ONCE))
    for uid, value in found:
        one = instances.decode_old(value)
        instances.put(txn, one.seq, one.put)
        txn.delete("instance", uid)
        txn.delete("member", f"{one.put.study}\0{one.put.series}\0".encode() + uid)
    return found[-1][0] if found else None


def _place_some(txn: Transaction, start: bytes) -> bytes | None:
    """Where copies lie."""
    found = list(islice(txn.scan("location", start), ROWS_AT_ONCE))
    for key, value in found:
        places.convert(txn, key, value)
    return found[-1][0] if found else None


def _shrink_some(txn: Transaction, start: bytes, applied: int, last: int) -> bytes | None:
    """What the log says of an applied instance is in its row; the rest goes to the table `entries`."""
    found = list(islice(txn.scan("log", start), ROWS_AT_ONCE))
    for _, value in found:
        entry = decode_entry(value)
        operation = entry.operation
        if entry.seq != last:  # an older version sees that it isn't for it
            txn.delete("log", seq_key(entry.seq))
        if isinstance(operation, Put) and entry.seq <= applied:
            row = instances.get(txn, instances.key_of(operation.sop_instance))
            if row is not None and row.seq == entry.seq:
                entries.applied(txn, entry.seq, operation)
        elif (entry.seq > applied or not isinstance(operation, Void)) and not txn.get("entries", seq_key(entry.seq)):
            txn.append("entries", seq_key(entry.seq), value)  # of the last one only its number may be left in `log`
    return found[-1][0] if found else None
