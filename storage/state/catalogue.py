"""What one node knows: log, catalogue, location of its copies, and a few facts, in one store (LMDB).

One writer thread, `write`, one transaction and one sync a batch. Readers open snapshots from any thread.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from storage.replication.epochs import Epochs
from storage.state import rows
from storage.state.kv import CatalogueDamaged, Kv, LmdbKv, Transaction
from storage.state.model import (
    Delete,
    Entry,
    Instance,
    Leaving,
    Location,
    Put,
    Task,
    TaskDone,
    Tombstone,
    Void,
    decode_entry,
    decode_instance,
    decode_leaving,
    decode_location,
    decode_task,
    encode,
)
from storage.state.rows import SeriesRow, StudyRow, identity_of, patient_key, series_row, study_row
from storage.upkeep.quarantine import DIVERGED

T = TypeVar("T")
ADOPTED: Final = "adopted-"  # instead of a spool name: a file that was taken over where it lay
PAGE_ROWS: Final = 500
TABLES: Final = (
    "log",  # seq -> Entry
    "meta",
    "location",  # seq of the entry -> where this node's copy lies
    "missing",  # seq -> why this node has no copy of its own now
    "leaving",  # volume/spool name -> file to be moved out of the way
    "instance",
    "tombstone",  # SOP Instance UID -> by which entry it was deleted
    "series",
    "study",
    "member",
    "patient",  # Patient ID, study -> nothing
    "series_study",  # series, study -> nothing
    "conflict",  # studies that name more than one patient
    "task",  # ID -> Task that isn't over
)


@dataclass
class Batch:
    """What one transaction does, in this order. `applies` are committed entries in log order."""

    truncate_after: int | None = None
    appends: list[tuple[Entry, Location | None]] = field(default_factory=list)
    applies: list[tuple[Entry, Location | None]] = field(default_factory=list)
    lost: dict[int, tuple[str, Location]] = field(default_factory=dict)  # seq -> (why, where the copy was)
    moved: dict[int, Location] = field(default_factory=dict)  # seq -> where its copy lies from now on
    gone: list[str] = field(default_factory=list)  # keys of `leaving` that are done
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def applied(self) -> int:
        return max((entry.seq for entry, _ in self.applies), default=0)


def same_copy(one: Location, other: Location) -> bool:
    """The same file, published or not."""
    return (one.volume, one.spool) == (other.volume, other.spool)


def seq_key(seq: int) -> bytes:
    return seq.to_bytes(8, "big")


class Catalogue:
    def __init__(self, kv: Kv) -> None:
        """Raises CatalogueDamaged."""
        self._kv = kv
        self.epochs = Epochs(self.meta("epochs", ()))
        last = self._last_seq()
        if self.epochs.last[1] != last:
            raise CatalogueDamaged(f"the log ends at {last}, its epochs at {self.epochs.last}")

    @classmethod
    def open(cls, path: Path, map_size_bytes: int) -> "Catalogue":
        """Raises CatalogueDamaged."""
        return cls(LmdbKv(path, map_size_bytes, TABLES))

    def close(self) -> None:
        self._kv.close()

    # -- facts and log -----------------------------------------------------------------------------------------

    def meta(self, name: str, default: Any) -> Any:
        with self._kv.read() as txn:
            return _meta(txn, name, default)

    @property
    def known_volumes(self) -> set[str]:
        """UUIDs of the volumes that hold, or have held, copies of this node."""
        return set(self.meta("volumes", ()))

    def entry(self, seq: int) -> Entry:
        return decode_entry(self.entry_bytes(seq))

    def entry_bytes(self, seq: int) -> bytes:
        with self._kv.read() as txn:
            value = txn.get("log", seq_key(seq))
        if value is None:
            raise CatalogueDamaged(f"log entry {seq} is missing")
        return value

    def entries(self, start: int, limit: int) -> list[Entry]:
        """Up to `limit` entries from seq `start` on."""
        found = []
        with self._kv.read() as txn:
            for _, value in txn.scan("log", seq_key(start)):
                found.append(decode_entry(value))
                if len(found) >= limit:
                    break
        return found

    def _last_seq(self) -> int:
        with self._kv.read() as txn:
            key = txn.last_key("log")
        return int.from_bytes(key, "big") if key else 0

    # -- copies ------------------------------------------------------------------------------------------------

    def location(self, seq: int) -> Location | None:
        with self._kv.read() as txn:
            value = txn.get("location", seq_key(seq))
        return decode_location(value) if value is not None else None

    def locations(self, start: int = 0, limit: int | None = None) -> Iterator[tuple[int, Location]]:
        """(seq, where the copy lies) in order of seq."""
        rows = self._paged("location", b"", lambda txn, key, value: (key, value), start=seq_key(start))
        for key, value in islice(rows, limit):
            yield int.from_bytes(key, "big"), decode_location(value)

    def missing(self, start: int = 0, limit: int | None = None) -> list[int]:
        """Entries whose bytes this node lacks, oldest first."""
        found: list[int] = []
        with self._kv.read() as txn:
            for key, _ in txn.scan("missing", seq_key(start)):
                if limit is not None and len(found) >= limit:
                    break
                found.append(int.from_bytes(key, "big"))
        return found

    def is_missing(self, seq: int) -> bool:
        with self._kv.read() as txn:
            return txn.get("missing", seq_key(seq)) is not None

    def leaving_paths(self) -> set[tuple[str, str]]:
        """(volume, path) of places in the tree that are not free yet."""
        with self._kv.read() as txn:
            if not txn.count("leaving"):
                return set()
            leavings = [decode_leaving(value).location for _, value in txn.scan("leaving")]
        return {(location.volume, location.path) for location in leavings if location.path}

    def leavings(self, limit: int, volume_id: str = "") -> list[tuple[str, Leaving]]:
        """Files on their way out, of all volumes or of one."""
        found: list[tuple[str, Leaving]] = []
        with self._kv.read() as txn:
            for key, value in txn.scan("leaving", volume_id.encode()):
                if len(found) >= limit or not key.startswith(volume_id.encode()):
                    break
                found.append((key.decode(), decode_leaving(value)))
        return found

    def named(self, spools: set[str]) -> dict[str, Location | None]:
        """Those of these "volume/spool name" that a copy has, with its place, or a leaving file (None)."""
        with self._kv.read() as txn:
            leaving = {key.decode() for key, _ in txn.scan("leaving")} & spools
            found: dict[str, Location | None] = dict.fromkeys(leaving)
            for _, value in txn.scan("location"):
                location = decode_location(value)
                key = f"{location.volume}/{location.spool}"
                if key in spools:
                    found[key] = location
        return found

    def tasks(self) -> list[Task]:
        """Promised and not over, oldest first."""
        with self._kv.read() as txn:
            found = [decode_task(value) for _, value in txn.scan("task")]
        return sorted(found, key=lambda task: task.at)

    def task_ids(self) -> list[str]:
        """Of those that were promised and aren't over."""
        with self._kv.read() as txn:
            return [key.decode() for key, _ in txn.scan("task")]

    def task_count(self) -> int:
        with self._kv.read() as txn:
            return txn.count("task")

    def task(self, task_id: str) -> Task | None:
        with self._kv.read() as txn:
            value = txn.get("task", task_id.encode())
        return decode_task(value) if value is not None else None

    def patients(self) -> Iterator[tuple[str, list[str]]]:
        """(Patient ID, Study Instance UIDs in which it is named), whatever its issuer."""
        size, studies, before = len(patient_key("")), list[str](), b""
        for key in self._paged("patient", b"", lambda txn, key, value: key):
            if key[:size] != before and studies:
                yield from self._patient(before, studies)
                studies = []
            before = key[:size]
            studies.append(key[size:].decode())
        if studies:
            yield from self._patient(before, studies)

    def _patient(self, key: bytes, studies: list[str]) -> Iterator[tuple[str, list[str]]]:
        row = self.study(studies[0])
        for patient in row.patients if row else ():
            if patient_key(identity_of(patient)[0]) == key:
                yield identity_of(patient)[0], studies
                return

    # -- instances and above -----------------------------------------------------------------------------------

    def instance(self, sop_instance: str) -> Instance | None:
        with self._kv.read() as txn:
            value = txn.get("instance", sop_instance.encode())
        return decode_instance(value) if value is not None else None

    def is_deleted(self, sop_instance: str) -> bool:
        """It was deleted and not stored again since."""
        with self._kv.read() as txn:
            return txn.get("tombstone", sop_instance.encode()) is not None

    def studies(self, patient_id: str | None = None) -> Iterator[tuple[str, StudyRow]]:
        """(Study Instance UID, row) of all studies, or of one patient's."""
        if patient_id is not None:
            prefix = patient_key(patient_id)
            rows = self._paged("patient", prefix, lambda txn, key, _: (key, txn.get("study", key[len(prefix) :])))
            for key, raw in rows:
                if raw is not None:
                    yield key[len(prefix) :].decode(), msgspec.msgpack.decode(raw, type=StudyRow)
            return
        for key, value in self._paged("study", b"", lambda txn, key, value: (key, value)):
            yield key.decode(), msgspec.msgpack.decode(value, type=StudyRow)

    def studies_of_series(self, series: str) -> list[str]:
        """The Study Instance UIDs in which a series is; more than one only where a sender used its UID twice."""
        prefix = series.encode() + b"\0"
        with self._kv.read() as txn:
            return [key[len(prefix) :].decode() for key in _below(txn, "series_study", prefix)]

    def conflicts(self, limit: int) -> list[str]:
        """Studies whose instances name more than one patient."""
        with self._kv.read() as txn:
            return [key.decode() for key, _ in islice(txn.scan("conflict"), limit)]

    def study(self, uid: str) -> StudyRow | None:
        with self._kv.read() as txn:
            row = txn.get("study", uid.encode())
        return None if row is None else msgspec.msgpack.decode(row, type=StudyRow)

    def series_of(self, study: str) -> Iterator[tuple[str, SeriesRow]]:
        prefix = study.encode() + b"\0"
        for key, value in self._paged("series", prefix, lambda txn, key, value: (key, value)):
            yield key[len(prefix) :].decode(), msgspec.msgpack.decode(value, type=SeriesRow)

    def instances_of(self, study: str, series: str) -> Iterator[Instance]:
        prefix = f"{study}\0{series}\0".encode()
        for raw in self._paged("member", prefix, lambda txn, key, _: txn.get("instance", key[len(prefix) :])):
            if raw is not None:
                yield decode_instance(raw)

    def _paged(
        self, table: str, prefix: bytes, read: Callable[[Transaction, bytes, bytes], T], start: bytes = b""
    ) -> Iterator[T]:
        """Rows below `prefix`, some hundreds from one snapshot: whoever takes his time with them holds up nobody."""
        at = start or prefix
        while True:
            page: list[T] = []
            last = b""
            with self._kv.read() as txn:
                for key, value in txn.scan(table, at):
                    if len(page) == PAGE_ROWS or not key.startswith(prefix):
                        break
                    page.append(read(txn, key, value))
                    last = key
            yield from page
            if len(page) < PAGE_ROWS:
                return
            at = last + b"\0"

    def count_instances(self, study: str, series: str | None = None) -> int:
        prefix = study.encode() + b"\0" + (series.encode() + b"\0" if series else b"")
        with self._kv.read() as txn:
            return sum(1 for _ in _below(txn, "member", prefix))

    def counts(self) -> dict[str, int]:
        with self._kv.read() as txn:
            return {
                "instances": txn.count("instance"),
                "studies": txn.count("study"),
                "bytes": int(_meta(txn, "bytes", 0)),
                "missing": txn.count("missing"),
                "conflicts": txn.count("conflict"),
            }

    def folders(self, put: Put, fresh: dict[str, str]) -> tuple[str, str]:
        """(patient/study folder, series folder) of an instance. `fresh` remembers those of this batch."""
        study = fresh.get(put.study)
        if study is None:
            row = self.study(put.study) or study_row(put)
            study = fresh[put.study] = f"{row.patient_folder}/{row.folder}"
        key = f"{put.study}\0{put.series}"
        series = fresh.get(key)
        if series is None:
            with self._kv.read() as txn:
                raw = txn.get("series", key.encode())
            series = msgspec.msgpack.decode(raw, type=SeriesRow).folder if raw else series_row(put).folder
            fresh[key] = series
        return study, series

    def path_of(self, entry: Entry, fresh: dict[str, str], *, own_name: bool = False) -> str:
        """Where in the readable tree an instance belongs. A version that replaces another has a name of its own, as has
        one that comes (`own_name`) before its predecessor has left."""
        put = entry.operation
        if not isinstance(put, Put):
            raise TypeError("only instances have a place in the tree")
        study, series = self.folders(put, fresh)
        version = f"~{entry.seq}" if put.replaces or own_name else ""
        return f"{study}/{series}/{put.sop_instance}{version}.dcm"

    # -- writing -----------------------------------------------------------------------------------------------

    def write(self, batch: Batch) -> None:
        """Do all of `batch` and make it durable. Whatever is raised, nothing of it was done."""
        epochs = Epochs(self.epochs.pairs)
        if batch.truncate_after is not None:
            epochs.truncate(batch.truncate_after)
        for entry, _ in batch.appends:
            epochs.append(entry.epoch, entry.seq)
        self._kv.update(lambda txn: self._write(txn, batch, epochs))
        self.epochs = epochs

    def _write(self, txn: Transaction, batch: Batch, epochs: Epochs) -> None:
        meta = dict(batch.meta)
        if batch.truncate_after is not None:
            _truncate(txn, batch.truncate_after)
        for entry, location in batch.appends:
            txn.put("log", seq_key(entry.seq), encode(entry))
            _locate(txn, entry, location)
        stored_bytes = 0
        for entry, location in batch.applies:
            stored_bytes += _apply(txn, entry, location)
        for seq, (why, location) in batch.lost.items():
            _lose(txn, seq, why, location)
        for seq, location in batch.moved.items():
            _move(txn, seq, location)
        for key in batch.gone:
            txn.delete("leaving", key.encode())
        if batch.appends or batch.truncate_after is not None:
            meta["epochs"] = epochs.pairs
        if batch.applies:
            meta["applied"] = max(_meta(txn, "applied", 0), batch.applied)
            meta["bytes"] = _meta(txn, "bytes", 0) + stored_bytes
        _put_meta(txn, meta)


def _meta(txn: Transaction, name: str, default: Any) -> Any:
    value = txn.get("meta", name.encode())
    return default if value is None else msgspec.msgpack.decode(value)


def _put_meta(txn: Transaction, meta: Mapping[str, Any]) -> None:
    for name, value in meta.items():
        txn.put("meta", name.encode(), msgspec.msgpack.encode(value))


def _below(txn: Transaction, table: str, prefix: bytes) -> Iterator[bytes]:
    for key, _ in txn.scan(table, prefix):
        if not key.startswith(prefix):
            return
        yield key


def _locate(txn: Transaction, entry: Entry, location: Location | None) -> None:
    key = seq_key(entry.seq)
    if location is not None:
        txn.put("location", key, encode(location))
    elif isinstance(entry.operation, Put):
        txn.put("missing", key, b"no disk took it")


def _leave(txn: Transaction, location: Location, sop_instance: str, reason: str, *, keep: bool = True) -> None:
    leaving = Leaving(location, sop_instance, reason, keep)
    txn.put("leaving", f"{location.volume}/{location.spool}".encode(), encode(leaving))


def _withdraw(txn: Transaction, seq: int, sop_instance: str, reason: str) -> None:
    """This node's copy of an entry is no longer wanted."""
    key = seq_key(seq)
    raw = txn.get("location", key)
    if raw is not None:
        _leave(txn, decode_location(raw), sop_instance, reason)
        txn.delete("location", key)
    txn.delete("missing", key)


def _truncate(txn: Transaction, after: int) -> None:
    dropped = [decode_entry(value) for _, value in txn.scan("log", seq_key(after + 1))]
    for entry in dropped:
        if isinstance(entry.operation, Put):
            _withdraw(txn, entry.seq, entry.operation.sop_instance, DIVERGED)
        txn.delete("log", seq_key(entry.seq))


def _lose(txn: Transaction, seq: int, why: str, was: Location) -> None:
    """The copy of an entry that was at a certain place is gone."""
    entry, raw = txn.get("log", seq_key(seq)), txn.get("location", seq_key(seq))
    if entry is None or not isinstance(decode_entry(entry).operation, Put):
        return  # deleted or cut off meanwhile
    if raw is not None and not same_copy(decode_location(raw), was):
        return  # it was made again elsewhere meanwhile
    txn.delete("location", seq_key(seq))
    txn.put("missing", seq_key(seq), why.encode())


def _move(txn: Transaction, seq: int, location: Location) -> None:
    key = seq_key(seq)
    entry, old = txn.get("log", key), txn.get("location", key)
    if entry is None or not isinstance(operation := decode_entry(entry).operation, Put):
        if not location.spool.startswith(ADOPTED):  # that one's place may be somebody else's by now
            _leave(txn, location, "", "deleted while it was being copied")
        return
    before = decode_location(old) if old is not None else location
    if before.spool != location.spool and (before.volume, before.path) != (location.volume, location.path):
        _leave(txn, before, operation.sop_instance, "copied to another volume", keep=False)
    txn.put("location", key, encode(location))
    txn.delete("missing", key)


def _apply(txn: Transaction, entry: Entry, location: Location | None) -> int:
    """Returns by how many bytes the archive grew."""
    operation = entry.operation
    if isinstance(operation, Put):
        return _apply_put(txn, entry.seq, operation, location)
    if isinstance(operation, Delete):
        return _apply_delete(txn, entry.seq, operation)
    if isinstance(operation, Task):
        txn.put("task", operation.id.encode(), encode(operation))
    elif isinstance(operation, TaskDone):
        txn.delete("task", operation.id.encode())
    return 0


def _apply_put(txn: Transaction, seq: int, put: Put, location: Location | None) -> int:
    uid = put.sop_instance.encode()
    raw = txn.get("instance", uid)
    grown = put.length
    if raw is not None and (old := decode_instance(raw)).seq != seq:
        grown -= rows.remove(txn, old.put)
        _supersede(txn, old.seq, old.put, "replaced by a newer version")
        if not rows.says_the_same(old.put, put):
            rows.made_anew(txn, old.put.study)
    if location is not None and txn.get("missing", seq_key(seq)) is None:
        txn.put("location", seq_key(seq), encode(location))
    rows.add(txn, seq, put)
    txn.delete("tombstone", uid)
    return grown


def _apply_delete(txn: Transaction, seq: int, delete: Delete) -> int:
    shrunk = 0
    for old in rows.matching(txn, delete):
        shrunk += rows.remove(txn, old.put)
        _supersede(txn, old.seq, old.put, f"deleted: {delete.reason}")
        txn.put("tombstone", old.put.sop_instance.encode(), encode(Tombstone(seq, delete.reason, delete.at)))
    rows.made_anew(txn, delete.study)
    return -shrunk


def _supersede(txn: Transaction, seq: int, put: Put, reason: str) -> None:
    _withdraw(txn, seq, put.sop_instance, reason)
    raw = txn.get("log", seq_key(seq))
    if raw is not None:
        txn.put("log", seq_key(seq), encode(Entry(decode_entry(raw).epoch, seq, Void())))
