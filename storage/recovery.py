"""What a node does before it takes part again: check the end of its log against the bytes, and tidy the spool.

Everything that was acknowledged was synced before. So an entry since the last checkpoint whose bytes are missing or
wrong means that a disk broke its promise: this copy is then no longer whole, which is noted durably before anything
else is done, and the node can't be promoted until it has followed a leader up to date.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
import xxhash

from storage.catalogue import Batch, Catalogue
from storage.model import Entry
from storage.volumes import Volumes

log = structlog.get_logger()
READ_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Recovered:
    """`missing` are published entries whose bytes this node lacks; to be fetched from the peer."""

    whole: bool
    missing: tuple[Entry, ...]


def file_digest(path: Path, offset: int) -> tuple[bytes, int]:
    """(xxh3-128 of what follows `offset`, length of the file). Raises OSError."""
    digest = xxhash.xxh3_128()
    length = 0
    with path.open("rb", buffering=0) as file:
        length += len(file.read(offset))
        while block := file.read(READ_BYTES):
            digest.update(block)
            length += len(block)
    return digest.digest(), length


def recover(catalogue: Catalogue, volumes: Volumes, *, verify: bool) -> Recovered:
    applied, last = int(catalogue.meta("applied", 0)), catalogue.epochs.last[1]
    checkpoint = int(catalogue.meta("checkpoint", 0))
    whole = bool(catalogue.meta("whole", True))
    missing: list[Entry] = []
    cut: int | None = None
    for seq in range(checkpoint + 1, last + 1):
        entry = catalogue.entry(seq)
        if _intact(catalogue, volumes, entry, verify=verify):
            continue
        whole = False
        log.error("recovery.lost", seq=seq, sop_instance=entry.operation.sop_instance)
        if seq > applied:
            cut = seq - 1
            break
        missing.append(entry)
    if not whole or cut is not None:
        catalogue.write(Batch(meta={"whole": False}))
    if cut is not None:
        catalogue.write(Batch(truncate_after=cut))
    _tidy(catalogue, volumes)
    return Recovered(whole, tuple(missing))


def _intact(catalogue: Catalogue, volumes: Volumes, entry: Entry, *, verify: bool) -> bool:
    put = entry.operation
    location = catalogue.location(put.sop_instance)
    if location is None:
        return False
    try:
        volume = volumes.get(location.volume)
        if location.path:
            volume.publish(location.spool, location.path)  # the rename may have been lost with the power
        path = volume.locate(location.spool, location.path)
        if path is None:
            study, series = catalogue.folders(put, {})  # or it was done and its record was lost
            path = volume.locate(location.spool, f"{study}/{series}/{put.sop_instance}.dcm")
        if path is None:
            return False
        if not verify:
            return path.stat().st_size == put.length
        return file_digest(path, put.offset) == (put.digest, put.length)
    except (OSError, LookupError) as error:
        log.error("recovery.unreadable", sop_instance=put.sop_instance, error=type(error).__name__)
        return False


def _tidy(catalogue: Catalogue, volumes: Volumes) -> None:
    """Remove spool files that no entry names: they were never complete, or never acknowledged."""
    wanted = catalogue.spool_names()
    for volume in volumes:
        for name in volume.spooled():
            if name not in wanted:
                (volume.path / "spool" / name).unlink(missing_ok=True)
