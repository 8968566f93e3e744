"""The LMDB store of one node: log, catalogue, location and a few facts, in one environment.

One writer thread, `write`, one transaction and one sync a batch: new log entries with their locations, and the
catalogue rows of entries committed before. Readers open snapshots from any thread.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import lmdb
import msgspec
import xxhash

from storage import keys, paths
from storage.epochs import Epochs
from storage.model import Entry, Instance, Location, Put, decode_entry, decode_instance, decode_location, encode

TABLES: Final = ("log", "meta", "instance", "series", "study", "member", "patient", "location")


class CatalogueDamaged(Exception):
    """LMDB can't be read or contradicts itself."""


class StudyRow(msgspec.Struct, frozen=True):
    keys: dict[str, str]
    patient_folder: str
    folder: str


class SeriesRow(msgspec.Struct, frozen=True):
    keys: dict[str, str]
    folder: str


@dataclass
class Batch:
    """What one transaction does. `applies` are committed entries in log order with the location after publication."""

    appends: list[tuple[Entry, Location]] = field(default_factory=list)
    applies: list[tuple[Entry, Location]] = field(default_factory=list)
    relocations: dict[str, Location] = field(default_factory=dict)  # of entries that aren't published yet
    meta: dict[str, Any] = field(default_factory=dict)
    truncate_after: int | None = None

    @property
    def applied(self) -> int:
        """Highest seq published; healed objects come out of order."""
        return max((entry.seq for entry, _ in self.applies), default=0)


def _seq_key(seq: int) -> bytes:
    return seq.to_bytes(8, "big")


class Catalogue:
    def __init__(self, path: Path, map_size_bytes: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        try:
            self._env = lmdb.open(str(path), map_size=map_size_bytes, max_dbs=len(TABLES), max_readers=256)
            self._db = {name: self._env.open_db(name.encode()) for name in TABLES}
        except lmdb.Error as error:
            raise CatalogueDamaged(f"{path}: {error}") from error
        self.epochs = Epochs(self.meta("epochs", ()))
        last = self._last_seq()
        if self.epochs.last[1] != last:
            raise CatalogueDamaged(f"{path}: log ends at {last}, its epochs at {self.epochs.last}")

    def close(self) -> None:
        self._env.close()

    # -- reading -----------------------------------------------------------------------------------------------

    def meta(self, name: str, default: Any) -> Any:
        with self._env.begin(db=self._db["meta"]) as txn:
            value = txn.get(name.encode())
        return default if value is None else msgspec.msgpack.decode(value)

    def entry(self, seq: int) -> Entry:
        return decode_entry(self.entry_bytes(seq))

    def entry_bytes(self, seq: int) -> bytes:
        with self._env.begin(db=self._db["log"]) as txn:
            value: bytes | None = txn.get(_seq_key(seq))
        if value is None:
            raise CatalogueDamaged(f"log entry {seq} is missing")
        return value

    def _last_seq(self) -> int:
        with self._env.begin(db=self._db["log"]) as txn, txn.cursor() as cursor:
            return int.from_bytes(cursor.key(), "big") if cursor.last() else 0

    def location(self, sop_instance: str) -> Location | None:
        with self._env.begin(db=self._db["location"]) as txn:
            value = txn.get(sop_instance.encode())
        return decode_location(value) if value is not None else None

    def instance(self, sop_instance: str) -> Instance | None:
        with self._env.begin(db=self._db["instance"]) as txn:
            value = txn.get(sop_instance.encode())
        return decode_instance(value) if value is not None else None

    def locations(self) -> Iterator[Location]:
        """Where each copy of this node lies."""
        with self._env.begin(db=self._db["location"]) as txn, txn.cursor() as cursor:
            for _, value in cursor:
                yield decode_location(value)

    def studies(self, patient_id: str | None = None) -> Iterator[tuple[str, StudyRow]]:
        """(Study Instance UID, row) of all studies, or of one patient's."""
        with self._env.begin() as txn:
            if patient_id is not None:
                prefix = _patient_key(patient_id)
                for key in self._below(txn, "patient", prefix):
                    uid = key[len(prefix) :]
                    row = txn.get(uid, db=self._db["study"])
                    if row is not None:
                        yield uid.decode(), msgspec.msgpack.decode(row, type=StudyRow)
                return
            with txn.cursor(self._db["study"]) as cursor:
                for key, value in cursor:
                    yield key.decode(), msgspec.msgpack.decode(value, type=StudyRow)

    def study(self, uid: str) -> StudyRow | None:
        with self._env.begin(db=self._db["study"]) as txn:
            row = txn.get(uid.encode())
        return None if row is None else msgspec.msgpack.decode(row, type=StudyRow)

    def series_of(self, study: str) -> Iterator[tuple[str, SeriesRow]]:
        with self._env.begin() as txn:
            prefix = study.encode() + b"\0"
            for key in self._below(txn, "series", prefix):
                raw: bytes = txn.get(key, db=self._db["series"], default=b"")
                row = msgspec.msgpack.decode(raw, type=SeriesRow)
                yield key[len(prefix) :].decode(), row

    def instances_of(self, study: str, series: str) -> Iterator[Instance]:
        with self._env.begin() as txn:
            prefix = f"{study}\0{series}\0".encode()
            for key in self._below(txn, "member", prefix):
                value = txn.get(key[len(prefix) :], db=self._db["instance"])
                if value is not None:
                    yield decode_instance(value)

    def count_instances(self, study: str, series: str | None = None) -> int:
        prefix = study.encode() + b"\0" + (series.encode() + b"\0" if series else b"")
        with self._env.begin() as txn:
            return sum(1 for _ in self._below(txn, "member", prefix))

    def _below(self, txn: Any, table: str, prefix: bytes) -> Iterator[bytes]:
        with txn.cursor(self._db[table]) as cursor:
            if cursor.set_range(prefix):
                for key in cursor.iternext(values=False):
                    if not key.startswith(prefix):
                        return
                    yield key

    def counts(self) -> dict[str, int]:
        with self._env.begin() as txn:
            return {
                "instances": txn.stat(self._db["instance"])["entries"],
                "studies": txn.stat(self._db["study"])["entries"],
                "bytes": int(self.meta("bytes", 0)),
            }

    # -- writing -----------------------------------------------------------------------------------------------

    def write(self, batch: Batch) -> None:
        """Do all of `batch` and make it durable. Raises lmdb.Error; then nothing of it was done."""
        epochs = Epochs(self.epochs.pairs)
        with self._env.begin(write=True) as txn:
            if batch.truncate_after is not None:
                self._truncate(txn, batch.truncate_after)
                epochs.truncate(batch.truncate_after)
            for entry, location in batch.appends:
                txn.put(_seq_key(entry.seq), encode(entry), db=self._db["log"], append=True)
                txn.put(entry.operation.sop_instance.encode(), encode(location), db=self._db["location"])
                epochs.append(entry.epoch, entry.seq)
            for sop_instance, moved in batch.relocations.items():
                txn.put(sop_instance.encode(), encode(moved), db=self._db["location"])
            stored_bytes = 0
            for entry, location in batch.applies:
                stored_bytes += self._apply(txn, entry, location)
            meta: dict[str, Any] = dict(batch.meta)
            if batch.appends or batch.truncate_after is not None:
                meta["epochs"] = epochs.pairs
            if batch.applies:
                meta["applied"] = max(self._meta_in(txn, "applied", 0), batch.applied)
                meta["bytes"] = self._meta_in(txn, "bytes", 0) + stored_bytes
            self._put_meta(txn, meta)
        self.epochs = epochs

    def _put_meta(self, txn: Any, meta: Mapping[str, Any]) -> None:
        for name, value in meta.items():
            txn.put(name.encode(), msgspec.msgpack.encode(value), db=self._db["meta"])

    def _meta_in(self, txn: Any, name: str, default: Any) -> Any:
        value = txn.get(name.encode(), db=self._db["meta"])
        return default if value is None else msgspec.msgpack.decode(value)

    def _truncate(self, txn: Any, after: int) -> None:
        with txn.cursor(self._db["log"]) as cursor:
            if cursor.set_range(_seq_key(after + 1)):
                more = True
                while more:
                    uid = decode_entry(cursor.value()).operation.sop_instance.encode()
                    if txn.get(uid, db=self._db["instance"]) is None:
                        txn.delete(uid, db=self._db["location"])
                    more = cursor.delete() and bool(cursor.key())

    def _apply(self, txn: Any, entry: Entry, location: Location) -> int:
        put = entry.operation
        uid = put.sop_instance.encode()
        txn.put(uid, encode(location), db=self._db["location"])
        known = txn.get(uid, db=self._db["instance"]) is not None
        txn.put(uid, encode(Instance(entry.seq, put)), db=self._db["instance"])
        study, series = put.study.encode(), f"{put.study}\0{put.series}".encode()
        if txn.get(study, db=self._db["study"]) is None:
            txn.put(study, msgspec.msgpack.encode(study_row(put)), db=self._db["study"])
            txn.put(_patient_key(put.keys.get("PatientID", "")) + study, b"", db=self._db["patient"])
        if txn.get(series, db=self._db["series"]) is None:
            txn.put(series, msgspec.msgpack.encode(series_row(put)), db=self._db["series"])
        txn.put(series + b"\0" + uid, b"", db=self._db["member"])
        return 0 if known else put.length

    def folders(self, put: Put, fresh: dict[str, str]) -> tuple[str, str]:
        """(patient/study folder, series folder) of an instance. `fresh` remembers those of this batch."""
        study = fresh.get(put.study)
        if study is None:
            row = self.study(put.study) or study_row(put)
            study = fresh[put.study] = f"{row.patient_folder}/{row.folder}"
        key = f"{put.study}\0{put.series}"
        series = fresh.get(key)
        if series is None:
            with self._env.begin(db=self._db["series"]) as txn:
                raw = txn.get(key.encode())
            series = msgspec.msgpack.decode(raw, type=SeriesRow).folder if raw else series_row(put).folder
            fresh[key] = series
        return study, series


def _patient_key(patient_id: str) -> bytes:
    """Patient IDs of any length as a key of fixed length."""
    return xxhash.xxh3_128_digest(patient_id.strip().encode("utf-8", "surrogatepass"))


def study_row(put: Put) -> StudyRow:
    kept = {name: put.keys[name] for name in (*keys.PATIENT, *keys.STUDY) if name in put.keys}
    patient = paths.patient_folder(put.keys.get("PatientID", ""))
    folder = paths.study_folder(put.study, put.keys.get("StudyDate", ""), put.keys.get("Modality", ""))
    return StudyRow(kept, patient, folder)


def series_row(put: Put) -> SeriesRow:
    kept = {name: put.keys[name] for name in keys.SERIES if name in put.keys}
    return SeriesRow(kept, paths.series_folder(put.series, put.keys.get("SeriesNumber", "")))
