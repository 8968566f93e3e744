"""The rows of the catalogue above the log: instance, series, study and patient, and how they come and go."""

import msgspec
import xxhash

from storage.objects import paths
from storage.state import keys
from storage.state.kv import Transaction
from storage.state.model import Delete, Instance, Put, decode_instance, encode


class StudyRow(msgspec.Struct, frozen=True):
    keys: dict[str, str]
    patient_folder: str
    folder: str


class SeriesRow(msgspec.Struct, frozen=True):
    keys: dict[str, str]
    folder: str


def patient_key(patient_id: str) -> bytes:
    """Patient IDs of any length as a key of fixed length."""
    return xxhash.xxh3_128_digest(patient_id.strip().encode("utf-8", "surrogatepass"))


def study_row(put: Put) -> StudyRow:
    kept = {name: put.keys[name] for name in (*keys.PATIENT, *keys.STUDY, *keys.OF_ALL) if name in put.keys}
    patient = paths.patient_folder(put.keys.get("PatientID", ""))
    folder = paths.study_folder(put.study, put.keys.get("StudyDate", ""), put.keys.get("Modality", ""))
    return StudyRow(kept, patient, folder)


def series_row(put: Put) -> SeriesRow:
    kept = {name: put.keys[name] for name in (*keys.SERIES, *keys.OF_ALL) if name in put.keys}
    return SeriesRow(kept, paths.series_folder(put.series, put.keys.get("SeriesNumber", "")))


def add(txn: Transaction, seq: int, put: Put) -> None:
    uid, study = put.sop_instance.encode(), put.study.encode()
    series = f"{put.study}\0{put.series}".encode()
    txn.put("instance", uid, encode(Instance(seq, put)))
    if txn.get("study", study) is None:
        row = study_row(put)
        txn.put("study", study, msgspec.msgpack.encode(row))
        txn.put("patient", patient_key(row.keys.get("PatientID", "")) + study, b"")
    if txn.get("series", series) is None:
        txn.put("series", series, msgspec.msgpack.encode(series_row(put)))
    txn.put("member", series + b"\0" + uid, b"")


def remove(txn: Transaction, put: Put) -> int:
    """Returns the bytes of the file. Series and study go with their last instance."""
    uid, study = put.sop_instance.encode(), put.study.encode()
    series = f"{put.study}\0{put.series}".encode()
    txn.delete("instance", uid)
    txn.delete("member", series + b"\0" + uid)
    if not _any(txn, "member", series + b"\0"):
        txn.delete("series", series)
    if not _any(txn, "series", study + b"\0"):
        raw = txn.get("study", study)
        if raw is not None:
            row = msgspec.msgpack.decode(raw, type=StudyRow)
            txn.delete("patient", patient_key(row.keys.get("PatientID", "")) + study)
            txn.delete("study", study)
    return put.length


def matching(txn: Transaction, delete: Delete) -> list[Instance]:
    """What a deletion names, as far as it is there."""
    if delete.sop_instance:
        raw = txn.get("instance", delete.sop_instance.encode())
        found = [decode_instance(raw)] if raw is not None else []
        return [one for one in found if one.put.study == delete.study]
    prefix = delete.study.encode() + b"\0" + (delete.series.encode() + b"\0" if delete.series else b"")
    uids = []
    for key, _ in txn.scan("member", prefix):
        if not key.startswith(prefix):
            break
        uids.append(key.rpartition(b"\0")[2])
    rows = (txn.get("instance", uid) for uid in uids)
    return [decode_instance(raw) for raw in rows if raw is not None]


def _any(txn: Transaction, table: str, prefix: bytes) -> bool:
    for key, _ in txn.scan(table, prefix):
        return key.startswith(prefix)
    return False
