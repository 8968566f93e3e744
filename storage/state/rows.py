"""The rows of the catalogue above the log: instance, series, study and patient, and how they come and go.

A patient is an ID together with its issuer. A study belongs to the patient of its first instance; an instance that
names another one is kept in the study, and the study is then found under both (`StudyRow.others`) and stands in the
table `conflict` until the contradiction is gone.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

import msgspec
import xxhash

from storage.objects import paths
from storage.state import indexes, instances, keys
from storage.state.kv import Kv, Transaction, in_steps
from storage.state.model import Delete, Instance, Put

Identity = tuple[str, str]  # (Patient ID, its issuer)
ROWS_AT_ONCE: Final = 2000


class StudyRow(msgspec.Struct, frozen=True):
    """`keys`: of the patient and the study, what came first, filled up by what came later. `others`: the patient keys
    of further patients that instances of it name."""

    keys: dict[str, str]
    patient_folder: str
    folder: str
    others: tuple[dict[str, str], ...] = ()

    @property
    def patients(self) -> list[dict[str, str]]:
        """The patient keys of each patient of it, its own first."""
        return [{name: self.keys[name] for name in keys.PATIENT if name in self.keys}, *self.others]


class SeriesRow(msgspec.Struct, frozen=True):
    keys: dict[str, str]
    folder: str


def patient_key(patient_id: str) -> bytes:
    """Patient IDs of any length as a key of fixed length."""
    return xxhash.xxh3_128_digest(patient_id.strip().encode("utf-8", "surrogatepass"))


def identity_of(found: dict[str, str]) -> Identity:
    """(Patient ID, issuer) by query keys."""
    return found.get("PatientID", "").strip(), found.get("IssuerOfPatientID", "").strip()


def same_patient(one: Identity, other: Identity) -> bool:
    """The same ID, and no two issuers that contradict each other."""
    return one[0] == other[0] and (one[1] == other[1] or not one[1] or not other[1])


def belongs(found: dict[str, str], row: StudyRow, patient: Identity) -> bool:
    """An instance of this study, by its query keys, is of this patient, one of the study's."""
    known = [identity_of(one) for one in row.patients]
    own = identity_of(found)
    if own in known:
        return own == patient
    return next((one for one in known if same_patient(one, own)), own) == patient


def study_row(put: Put) -> StudyRow:
    kept = {name: put.keys[name] for name in (*keys.PATIENT, *keys.STUDY, *keys.OF_ALL) if name in put.keys}
    patient = paths.patient_folder(put.keys.get("PatientID", ""))
    folder = paths.study_folder(put.study, put.keys.get("StudyDate", ""), put.keys.get("Modality", ""))
    return StudyRow(kept, patient, folder)


def series_row(put: Put) -> SeriesRow:
    kept = {name: put.keys[name] for name in (*keys.SERIES, *keys.OF_ALL) if name in put.keys}
    return SeriesRow(kept, paths.series_folder(put.series, put.keys.get("SeriesNumber", "")))


def add(txn: Transaction, seq: int, put: Put) -> None:
    instances.put(txn, seq, put)
    join(txn, put)


def join(txn: Transaction, put: Put) -> None:
    """Bring the rows of study, series and patient up to date with one instance."""
    study = put.study.encode()
    series = f"{put.study}\0{put.series}".encode()
    raw = txn.get("study", study)
    before = msgspec.msgpack.decode(raw, type=StudyRow) if raw is not None else None
    row = _joined(before, put) if before is not None else study_row(put)
    encoded = msgspec.msgpack.encode(row)
    if encoded != raw:
        txn.put("study", study, encoded)
        indexes.changed(txn, put.study, before, row)
        for one in row.patients:
            txn.put("patient", patient_key(identity_of(one)[0]) + study, b"")
        if row.others:
            txn.put("conflict", study, b"")
    raw = txn.get("series", series)
    if raw is None:
        txn.put("series", series, msgspec.msgpack.encode(series_row(put)))
        indexes.count_series(txn, put.study, row, put.keys.get("Modality", ""), 1)
        txn.put("series_study", f"{put.series}\0{put.study}".encode(), b"")
        return
    known = msgspec.msgpack.decode(raw, type=SeriesRow)
    filled = _filled(known.keys, put, keys.SERIES)
    if filled is not known.keys:
        txn.put("series", series, msgspec.msgpack.encode(SeriesRow(filled, known.folder)))
        if "Modality" not in known.keys:
            indexes.count_series(txn, put.study, row, filled.get("Modality", ""), 1)


def _joined(row: StudyRow, put: Put) -> StudyRow:
    own, known = identity_of(put.keys), [identity_of(one) for one in row.patients]
    if same_patient(known[0], own):
        filled = _filled(_filled(row.keys, put, keys.STUDY), put, keys.PATIENT)
        return row if filled is row.keys else msgspec.structs.replace(row, keys=filled)
    filled = _filled(row.keys, put, keys.STUDY)
    others = row.others
    if not any(same_patient(one, own) for one in known[1:]):
        wanted = (*keys.PATIENT, *keys.OF_ALL)
        others = (*others, {name: put.keys[name] for name in wanted if name in put.keys})
    if filled is row.keys and others is row.others:
        return row
    return msgspec.structs.replace(row, keys=filled, others=others)


def _filled(known: dict[str, str], put: Put, level: dict[str, int]) -> dict[str, str]:
    """`known` with what it lacks and an instance has; the same object if that is nothing. Texts in another character
    set are left out: the row has one for all."""
    more = {name: put.keys[name] for name in level if name in put.keys and name not in known}
    if not more:
        return known
    if put.keys.get("SpecificCharacterSet", "") != known.get("SpecificCharacterSet", ""):
        more = {name: text for name, text in more.items() if text.isascii()}
    return {**known, **more} if more else known


def remove(txn: Transaction, put: Put) -> int:
    """Returns the bytes of the file. Series and study go with their last instance."""
    study = put.study.encode()
    if instances.remove(txn, put):
        _forget_series(txn, study, f"{put.study}\0{put.series}".encode())
        txn.delete("series_study", f"{put.series}\0{put.study}".encode())
    if not _any(txn, "series", study + b"\0"):
        _forget_study(txn, study)
    return put.length


def _forget_series(txn: Transaction, study: bytes, series: bytes) -> None:
    raw, of_study = txn.get("series", series), txn.get("study", study)
    if raw is not None and of_study is not None:
        row, said = msgspec.msgpack.decode(raw, type=SeriesRow), msgspec.msgpack.decode(of_study, type=StudyRow)
        indexes.count_series(txn, study.decode(), said, row.keys.get("Modality", ""), -1)
    txn.delete("series", series)


def _forget_study(txn: Transaction, study: bytes) -> None:
    """To be called when its series are gone."""
    raw = txn.get("study", study)
    if raw is not None:
        row = msgspec.msgpack.decode(raw, type=StudyRow)
        _forget_row(txn, study, row)
        indexes.changed(txn, study.decode(), row, None)


def _forget_row(txn: Transaction, study: bytes, row: StudyRow) -> None:
    """But for the indexes."""
    for one in row.patients:
        txn.delete("patient", patient_key(identity_of(one)[0]) + study)
    txn.delete("study", study)
    txn.delete("conflict", study)


def made_anew(txn: Transaction, study: str) -> None:
    """Fill a study's rows from the instances that are left, after one of them has gone. Its folders stay."""
    key = study.encode()
    raw = txn.get("study", key)
    if raw is None:
        return
    before = msgspec.msgpack.decode(raw, type=StudyRow)
    folders = {}
    for series, value in list(_below(txn, "series", key + b"\0")):
        folders[series] = msgspec.msgpack.decode(value, type=SeriesRow).folder
        _forget_series(txn, key, series)
    _forget_row(txn, key, before)
    for one in sorted(matching(txn, Delete(study, "", "", "", "", 0.0)), key=lambda instance: instance.seq):
        join(txn, one.put)
    raw = txn.get("study", key)
    row = msgspec.msgpack.decode(raw, type=StudyRow) if raw is not None else None
    if row is not None:
        row = msgspec.structs.replace(row, patient_folder=before.patient_folder, folder=before.folder)
        txn.put("study", key, msgspec.msgpack.encode(row))
    indexes.changed(txn, study, before, row)  # its number stays: who goes through studies neither misses nor repeats it
    for series, folder in folders.items():
        if (made := txn.get("series", series)) is not None:
            filled = msgspec.msgpack.decode(made, type=SeriesRow)
            txn.put("series", series, msgspec.msgpack.encode(SeriesRow(filled.keys, folder)))


def one_less(txn: Transaction, put: Put) -> None:
    """The same, but only if none that is left says what this one has said: there may be thousands that go, one by
    one."""
    number = instances.number_of(txn, put.study, put.series)
    left = next(instances.members(txn, number) if number is not None else members(txn, put.study, ""), None)
    other = instances.get(txn, left) if left is not None else None
    names = (*keys.PATIENT, *keys.STUDY, *keys.OF_ALL, *(keys.SERIES if number is not None else ()))
    if other is None or not _agree(put, other.put, names):
        made_anew(txn, put.study)


def says_the_same(one: Put, other: Put) -> bool:
    """Of the same study and series, and nothing in the rows above depends on which of them is there."""
    above = (*keys.PATIENT, *keys.STUDY, *keys.SERIES, *keys.OF_ALL)
    return (one.study, one.series) == (other.study, other.series) and _agree(one, other, above)


def _agree(one: Put, other: Put, names: Iterable[str]) -> bool:
    return all(one.keys.get(name) == other.keys.get(name) for name in names)


def matching(txn: Transaction, delete: Delete) -> list[Instance]:
    """What a deletion names, as far as it is there."""
    if delete.sop_instance:
        one = instances.get(txn, instances.key_of(delete.sop_instance))
        return [one] if one is not None and one.put.study == delete.study else []
    found = [instances.get(txn, key) for key in members(txn, delete.study, delete.series)]
    return [one for one in found if one is not None]


def members(txn: Transaction, study: str, series: str = "") -> Iterator[bytes]:
    """Keys of the instances of a study, or of one of its series."""
    for number in [instances.number_of(txn, study, series)] if series else numbers(txn, study):
        yield from instances.members(txn, number)


def numbers(txn: Transaction, study: str) -> list[bytes]:
    """Of a study's series, see `instances`."""
    return [number for _, number in _below(txn, "number", study.encode() + b"\0")]


def _below(txn: Transaction, table: str, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    for key, value in txn.scan(table, prefix):
        if not key.startswith(prefix):
            return
        yield key, value


def _any(txn: Transaction, table: str, prefix: bytes) -> bool:
    for key, _ in txn.scan(table, prefix):
        return key.startswith(prefix)
    return False


# -- catalogues without indexes ----------------------------------------------------------------------------------------


def index_anew(kv: Kv) -> None:
    """Nothing of what was there before is left. One that is broken off begins anew."""
    in_steps(kv, _unindexed_some)
    in_steps(kv, _index_some)


def _unindexed_some(txn: Transaction, _: bytes) -> bytes | None:
    """Nothing is left of indexes that were begun."""
    gone = False
    for table in indexes.TABLES:
        for key in [key for key, _ in islice(txn.scan(table), ROWS_AT_ONCE)]:
            txn.delete(table, key)
            gone = True
    return b"" if gone else None


def _index_some(txn: Transaction, start: bytes) -> bytes | None:
    """Studies from a UID on get their indexes."""
    found = list(islice(txn.scan("study", start), ROWS_AT_ONCE))
    for key, raw in found:
        row = msgspec.msgpack.decode(raw, type=StudyRow)
        indexes.changed(txn, key.decode(), None, row)
        for _, value in _below(txn, "series", key + b"\0"):
            modality = msgspec.msgpack.decode(value, type=SeriesRow).keys.get("Modality", "")
            indexes.count_series(txn, key.decode(), row, modality, 1)
    return found[-1][0] if found else None
