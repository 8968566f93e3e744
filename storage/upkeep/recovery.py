"""What a node does before it takes part again: bring the catalogue up to the end of the log, check that end against the
bytes, and tidy the spool.

Everything that was acknowledged was synced before, in the log or on a volume. What a volume has lost of what the log
still has is written again. So an entry since the last checkpoint whose bytes are missing or wrong after that means that
a disk broke its promise or is away. Nothing is cut off or deleted here: the entry stays, is noted as missing until its
bytes are back, and this copy isn't whole, so that the node can't be promoted until it has followed a leader up to date.
"""

from dataclasses import dataclass
from typing import Final

import structlog

from storage.log.folder import LogDamaged
from storage.log.log import Log
from storage.objects.blob_store import holds
from storage.objects.describing import describe, said_in_spool
from storage.objects.volume import NoRoom, set_aside
from storage.objects.volumes import Volumes
from storage.state.catalogue import Batch, Catalogue
from storage.state.description import has_room, packed, with_description
from storage.state.logged import logged, record_of
from storage.state.model import Entry, Location, Put

log = structlog.get_logger()

REPLAY_ENTRIES: Final = 256


@dataclass(frozen=True)
class Recovered:
    """`whole`: nothing is missing that wasn't known before; `away` are volumes that hold objects and aren't online."""

    whole: bool
    away: frozenset[str]


def recover(catalogue: Catalogue, kept: Log, volumes: Volumes, *, verify: bool) -> Recovered:
    """Raises OSError, LogDamaged."""
    _replay(catalogue, kept)
    lineage = str(catalogue.meta("lineage", ""))
    last = catalogue.epochs.last[1]
    checkpoint = int(catalogue.meta("checkpoint", 0))
    touched: dict[str, set[str]] = {}
    described = True
    lost: dict[int, tuple[str, Location]] = {}
    later: dict[int, tuple[str, Location]] = {}  # no volume takes now what the log has: healing does it
    for seq in range(checkpoint + 1, last + 1):
        entry = catalogue.entry(seq)
        if not isinstance(entry.operation, Put):
            continue
        location = catalogue.location(seq)
        problem = _problem(volumes, entry, location, touched, verify=verify)
        described &= _says(volumes, entry, location, lineage)
        data = _logged_bytes(kept, seq) if problem else None
        if not problem or (data is not None and _write_again(catalogue, volumes, entry, data)):
            continue
        if data is not None:
            later[seq] = (problem, location or Location("", "", ""))
        elif not catalogue.is_missing(seq):
            log.error("recovery.lost", seq=seq, sop_instance=entry.operation.sop_instance, why=problem)
            lost[seq] = (problem, location or Location("", "", ""))
    for volume in volumes:
        try:
            volume.sync_directories(touched.get(volume.id, ()))  # what was renamed again must not need a third time
        except OSError as error:
            volumes.failed(volume.id, error)
    online = {volume.id for volume in volumes}
    known = catalogue.known_volumes
    away = known - online
    for volume_id in away:
        log.error("recovery.volume_away", volume=volume_id)
    lost = {seq: found for seq, found in lost.items() if not _on(catalogue, seq, away)}
    whole = bool(catalogue.meta("whole", True)) and not lost and not away
    facts = {"volumes": sorted(known | online), "whole": whole} | ({} if described else {"undescribed": True})
    catalogue.write(Batch(lost=lost | later, meta=facts))
    _tidy(catalogue, volumes)
    return Recovered(whole, frozenset(away))


def _replay(catalogue: Catalogue, kept: Log) -> None:
    """Log and catalogue end at the same entry afterwards. The log is behind where the power went while its tail was cut
    off: the catalogue still has that, and it is cut off again once a leader is followed."""
    start = kept.last[1] + 1
    while behind := catalogue.entries(start, REPLAY_ENTRIES):
        kept.append(record_of(entry, catalogue.location(entry.seq)) for entry in behind)
        start = behind[-1].seq + 1
    start = catalogue.epochs.last[1] + 1
    while start <= kept.last[1]:
        end = min(start + REPLAY_ENTRIES - 1, kept.last[1])
        batch = Batch()
        for record in kept.records(start, end):
            found = logged(record)
            batch.appends.append((found.entry, found.location))
        catalogue.write(batch)
        start = end + 1


def _logged_bytes(kept: Log, seq: int) -> bytes | None:
    try:
        return logged(kept.read(seq)).data
    except (KeyError, LogDamaged) as error:
        if isinstance(error, LogDamaged):
            log.error("log.damaged", seq=seq, error=str(error))
        return None


def _write_again(catalogue: Catalogue, volumes: Volumes, entry: Entry, data: bytes) -> bool:
    """What the log has, to a volume that takes it."""
    study = entry.operation.study if isinstance(entry.operation, Put) else ""
    for _ in volumes.slots:
        try:
            volume = volumes.place(study, catalogue.volume_of)
        except NoRoom:
            return False
        try:
            spooled = volume.create()
            spooled.write(_described(entry, str(catalogue.meta("lineage", "")), data))
            spooled.finish(entry.operation.digest if isinstance(entry.operation, Put) else b"")
            volume.sync_spool()
            break
        except OSError as error:
            volumes.failed(volume.id, error)
    else:
        return False
    path = ""
    if entry.seq <= int(catalogue.meta("applied", 0)):
        path = catalogue.path_of(entry, {})
        if (volume.id, path) in catalogue.leaving_paths():
            path = catalogue.path_of(entry, {}, own_name=True)
    location = Location(volume.id, spooled.name, path)
    said = catalogue.meta("lineage", "") and isinstance(put := entry.operation, Put) and has_room(data[: put.offset])
    catalogue.write(Batch(moved={entry.seq: location}, meta={} if said else {"undescribed": True}))
    if path:
        try:
            volume.sync_directories(volume.publish(location.spool, path))
        except OSError as error:
            volumes.failed(volume.id, error)
    return True


def _described(entry: Entry, lineage: str, data: bytes) -> list[bytes]:
    """The file of an entry; it says what it is."""
    put = entry.operation
    if not isinstance(put, Put) or not lineage:
        return [data]
    return [with_description(data[: put.offset], packed(entry, lineage)), data[put.offset :]]


def _on(catalogue: Catalogue, seq: int, volume_ids: set[str]) -> bool:
    location = catalogue.location(seq)
    return location is not None and location.volume in volume_ids


def _problem(
    volumes: Volumes,
    entry: Entry,
    location: Location | None,
    touched: dict[str, set[str]],
    *,
    verify: bool,
) -> str:
    """What is wrong with the copy of an entry, "" if nothing."""
    put = entry.operation
    if not isinstance(put, Put):
        return ""
    if location is None:
        return "no copy is noted"
    try:
        volume = volumes.get(location.volume)
        if location.path:
            # The rename may have been lost with the power.
            touched.setdefault(volume.id, set()).update(volume.publish(location.spool, location.path))
        name = volume.locate(location)
        if name is None:
            return "the file is gone"
        good = holds(volume, name, put) if verify else volume.size(name) == put.length
        if not good:
            set_aside(volume, name, "damaged", {"sop_instance": put.sop_instance})
        return "" if good else "damaged"
    except (OSError, LookupError) as error:
        log.error("recovery.unreadable", sop_instance=put.sop_instance, error=type(error).__name__)
        return "the file can't be read"


def _says(volumes: Volumes, entry: Entry, location: Location | None, lineage: str) -> bool:
    """Have the file of an entry, if there is one, say which it is."""
    try:
        if location is not None and (name := (volume := volumes.get(location.volume)).locate(location)):
            return describe(volume, name, entry, lineage)
    except (OSError, LookupError):
        return False
    return True


def _tidy(catalogue: Catalogue, volumes: Volumes) -> None:
    """Set aside spool files that no entry names: they were never complete, or never acknowledged."""
    for volume in volumes:
        try:
            present = {f"{volume.id}/{name}": name for name in volume.spooled()}
            named = catalogue.named(said_in_spool(volume, present.values())) if present else {}
            touched: set[str] = set()
            for location in named.values():
                if location and location.path:  # made again, and its rename was lost with the power
                    touched |= volume.publish(location.spool, location.path)
            volume.sync_directories(touched)
            for key in sorted(present.keys() - named.keys()):
                volume.quarantine(f"spool/{present[key]}", "left over from a crash; no entry names it", {})
            volume.sync_quarantine()
        except OSError as error:
            volumes.failed(volume.id, error)
