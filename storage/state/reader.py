"""What readers ask of the catalogue: patients, studies, series, instances, promised work. Any process may be one."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Final, TypeVar

import msgspec

from storage.state import changes, indexes, instances, rows
from storage.state.indexes import Range
from storage.state.kv import Readable, Transaction
from storage.state.model import Delete, Instance, Task, decode_task
from storage.state.rows import SeriesRow, StudyRow, identity_of, patient_key

T = TypeVar("T")
PAGE_ROWS: Final = 500
_study_row = msgspec.msgpack.Decoder(StudyRow).decode
_series_row = msgspec.msgpack.Decoder(SeriesRow).decode


class Reader:
    """Every method blocks, some for as long as there are rows."""

    def __init__(self, kv: Readable) -> None:
        self._readable = kv

    def tasks(self) -> list[Task]:
        """Promised and not over, oldest first."""
        with self._readable.read() as txn:
            found = [decode_task(value) for _, value in txn.scan("task")]
        return sorted(found, key=lambda task: task.at)

    def task_ids(self) -> list[str]:
        """Of those that were promised and aren't over."""
        with self._readable.read() as txn:
            return [key.decode() for key, _ in txn.scan("task")]

    def task_count(self) -> int:
        with self._readable.read() as txn:
            return txn.count("task")

    def task(self, task_id: str) -> Task | None:
        with self._readable.read() as txn:
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

    def instance(self, sop_instance: str) -> Instance | None:
        with self._readable.read() as txn:
            return instances.get(txn, instances.key_of(sop_instance))

    def is_deleted(self, sop_instance: str) -> bool:
        """It was deleted and not stored again since."""
        with self._readable.read() as txn:
            return txn.get("tombstone", sop_instance.encode()) is not None

    def studies(self, patient_id: str | None = None) -> Iterator[tuple[str, StudyRow]]:
        """(Study Instance UID, row) of all studies, or of one patient's."""
        if patient_id is not None:
            prefix = patient_key(patient_id)
            rows = self._paged("patient", prefix, lambda txn, key, _: (key, txn.get("study", key[len(prefix) :])))
            for key, raw in rows:
                if raw is not None:
                    yield key[len(prefix) :].decode(), _study_row(raw)
            return
        for key, value in self._paged("study", b"", lambda txn, key, value: (key, value)):
            yield key.decode(), _study_row(value)

    def studies_of_series(self, series: str) -> list[str]:
        """The Study Instance UIDs in which a series is; more than one only where a sender used its UID twice."""
        prefix = series.encode() + b"\0"
        with self._readable.read() as txn:
            return [key[len(prefix) :].decode() for key in changes.below(txn, "series_study", prefix)]

    def conflicts(self, limit: int) -> list[str]:
        """Studies whose instances name more than one patient."""
        with self._readable.read() as txn:
            return [key.decode() for key, _ in islice(txn.scan("conflict"), limit)]

    def numbers(self, asked: Range) -> Iterator[bytes | None]:
        """Of studies that an index finds, see `indexes`; the same one more than once, perhaps. None now and then: a
        moment for others."""
        after = b""
        while True:
            with self._readable.read() as txn:
                page = list(islice(indexes.numbers(txn, asked, after), PAGE_ROWS))
            yield from (key[-indexes.NUMBER_BYTES :] for key in page)
            if len(page) < PAGE_ROWS:
                return
            yield None
            after = page[-1]

    def with_part(self, part: bytes) -> Iterator[bytes | None]:
        """Numbers of studies with this somewhere in their folded texts. None now and then: a moment for others."""
        after = b""
        while True:
            with self._readable.read() as txn:
                page = list(islice(indexes.parts(txn, part, after), PAGE_ROWS))
            for _, numbers in page:
                yield from numbers
            if len(page) < PAGE_ROWS:
                return
            yield None
            after = page[-1][0]

    def modalities(self) -> list[str]:
        """Those that there are."""
        with self._readable.read() as txn:
            return list(indexes.modalities(txn))

    def numbered(self, numbers: Iterable[bytes]) -> list[tuple[str, StudyRow]]:
        """(Study Instance UID, row) of those of these that are there."""
        found = []
        with self._readable.read() as txn:
            for number in numbers:
                uid = txn.get("numbered", number)
                raw = txn.get("study", uid) if uid is not None else None
                if uid is not None and raw is not None:
                    found.append((uid.decode(), _study_row(raw)))
        return found

    def study(self, uid: str) -> StudyRow | None:
        with self._readable.read() as txn:
            row = txn.get("study", uid.encode())
        return None if row is None else _study_row(row)

    def series_of(self, study: str) -> Iterator[tuple[str, SeriesRow]]:
        prefix = study.encode() + b"\0"
        for key, value in self._paged("series", prefix, lambda txn, key, value: (key, value)):
            yield key[len(prefix) :].decode(), _series_row(value)

    def instances_of(self, study: str, series: str) -> Iterator[Instance]:
        size = instances.NUMBER_BYTES
        found = self._paged(
            "members",
            lambda txn: instances.number_of(txn, study, series),
            lambda txn, key, _: instances.get(txn, key[size:]),
        )
        for one in found:
            if one is not None and (one.put.study, one.put.series) == (study, series):
                yield one

    def _paged(
        self,
        table: str,
        below: bytes | Callable[[Transaction], bytes | None],
        read: Callable[[Transaction, bytes, bytes], T],
        start: bytes = b"",
    ) -> Iterator[T]:
        """Rows below a prefix, some hundreds from one snapshot: whoever takes his time with them holds up nobody.
        `below`: the prefix, or what finds it in the first snapshot."""
        prefix: bytes | None = None
        at = start
        while True:
            page: list[T] = []
            last = b""
            with self._readable.read() as txn:
                if prefix is None:
                    prefix = below if isinstance(below, bytes) else below(txn)
                if prefix is None:
                    return
                at = at or prefix
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
        with self._readable.read() as txn:
            numbers = [instances.number_of(txn, study, series)] if series else rows.numbers(txn, study)
            return sum(sum(instances.tally(txn, number).values()) for number in numbers)

    def sop_classes(self, study: str) -> set[str]:
        """SOP Class UIDs of a study's instances."""
        with self._readable.read() as txn:
            return {uid for number in rows.numbers(txn, study) for uid in instances.tally(txn, number)}

    def count_matching(self, delete: Delete) -> int:
        """Instances that a deletion names."""
        with self._readable.read() as txn:
            return len(rows.matching(txn, delete))

    def counts(self) -> dict[str, int]:
        with self._readable.read() as txn:
            return {
                "instances": txn.count("instances"),
                "studies": txn.count("study"),
                "bytes": int(changes.meta(txn, "bytes", 0)),
                "missing": txn.count("missing"),
                "conflicts": txn.count("conflict"),
            }
