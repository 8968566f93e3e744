"""What a node does before it takes part again: check the end of its log against the bytes, and tidy the spool.

Everything that was acknowledged was synced before. So an entry since the last checkpoint whose bytes are missing or
wrong means that a disk broke its promise or is away. Nothing is cut off or deleted here: the entry stays, is noted as
missing until its bytes are back, and this copy isn't whole, so that the node can't be promoted until it has followed a
leader up to date.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
import xxhash

from storage.catalogue import Batch, Catalogue
from storage.model import Entry, Location
from storage.volume import Volume
from storage.volumes import Volumes

log = structlog.get_logger()
READ_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Recovered:
    """`missing` are entries whose bytes this node lacks; `away` are volumes that hold objects and aren't online."""

    missing: tuple[Entry, ...]
    away: frozenset[str]

    @property
    def whole(self) -> bool:
        return not self.missing and not self.away


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
    last = catalogue.epochs.last[1]
    doubtful = set(range(int(catalogue.meta("checkpoint", 0)) + 1, last + 1))
    doubtful |= {int(seq) for seq in catalogue.meta("missing", ()) if int(seq) <= last}
    touched: dict[str, set[Path]] = {}
    missing = []
    for seq in sorted(doubtful):
        entry = catalogue.entry(seq)
        if not _intact(catalogue, volumes, entry, touched, verify=verify):
            log.error("recovery.lost", seq=seq, sop_instance=entry.operation.sop_instance)
            missing.append(entry)
    for volume in volumes:
        volume.sync_directories(touched.get(volume.id, ()))  # what was renamed again must not need a third time
    online = {volume.id for volume in volumes}
    known = {str(volume_id) for volume_id in catalogue.meta("volumes", ())}
    for volume_id in known - online:
        log.error("recovery.volume_away", volume=volume_id)
    catalogue.write(Batch(meta={"missing": [entry.seq for entry in missing], "volumes": sorted(known | online)}))
    _tidy(catalogue, volumes)
    return Recovered(tuple(missing), frozenset(known - online))


def _intact(
    catalogue: Catalogue, volumes: Volumes, entry: Entry, touched: dict[str, set[Path]], *, verify: bool
) -> bool:
    put = entry.operation
    location = catalogue.location(put.sop_instance)
    if location is None:
        return False
    try:
        volume = volumes.get(location.volume)
        if location.path:
            # The rename may have been lost with the power.
            touched.setdefault(volume.id, set()).update(volume.publish(location.spool, location.path))
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
    """Set aside spool files that no entry names: they were never complete, or never acknowledged."""
    for volume in volumes:
        present = set(volume.spooled())
        if not present:
            continue
        wanted = {
            location.spool
            for location in catalogue.locations()
            if location.spool in present and location.volume == volume.id and not _published(volume, location)
        }
        for name in present - wanted:
            volume.quarantine(volume.path / "spool" / name, "left over from a crash; no entry names it", {})


def _published(volume: Volume, location: Location) -> bool:
    return bool(location.path) and (volume.path / "archive" / location.path).is_file()
