"""Queries (PS3.4 C.4.1): from an identifier to answers. The catalogue has the usual attributes of each level; any other
is read from the file of the (first) instance, so that it can be matched and returned at whatever level it is asked for.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from conf.settings import DicomSettings
from gateway.archive.planning import Plan
from gateway.dicom.identifiers import UNIQUE, BadQuery, is_single, level_of, values_of
from gateway.dicom.matching import (
    Matcher,
    bounds,
    in_range,
    is_universal,
    matcher,
    matches_element,
    text_of,
)
from gateway.dicom.sop_classes import Model
from storage.state import keys
from storage.state.model import Instance
from storage.store import Identity, Rows, StudyRow, belongs, identity_of

ALL_LEVELS: Final = ("PATIENT", "STUDY", "SERIES", "IMAGE")
COUNTS: Final = {
    "NumberOfPatientRelatedStudies": "PATIENT",
    "NumberOfPatientRelatedSeries": "PATIENT",
    "NumberOfPatientRelatedInstances": "PATIENT",
    "NumberOfStudyRelatedSeries": "STUDY",
    "NumberOfStudyRelatedInstances": "STUDY",
    "NumberOfSeriesRelatedInstances": "SERIES",
}
GATHERED: Final = {"ModalitiesInStudy": "STUDY", "SOPClassesInStudy": "STUDY"}
ALWAYS: Final = frozenset(("SpecificCharacterSet", "QueryRetrieveLevel", "RetrieveAETitle", "InstanceAvailability"))
IGNORED: Final = ALWAYS | frozenset(("TimezoneOffsetFromUTC",))
LEVEL_OF: Final = {keyword: level for level, kept in keys.LEVELS.items() for keyword in kept} | COUNTS | GATHERED
PAIRS: Final = (
    ("StudyDate", "StudyTime"),
    ("SeriesDate", "SeriesTime"),
    ("ContentDate", "ContentTime"),
    ("AcquisitionDate", "AcquisitionTime"),
    ("PerformedProcedureStepStartDate", "PerformedProcedureStepStartTime"),
)
UTF_8: Final = "ISO_IR 192"
TEXT_VRS: Final = frozenset(("PN", "LO", "SH", "LT", "ST", "UC", "UT"))

Head = Callable[[Instance], Dataset | None]


@dataclass(frozen=True)
class Extended:
    """What was agreed on for a query/retrieve SOP class (PS3.4 C.5.1.1.1, C.5.2.1.1)."""

    relational: bool = False
    date_time: bool = False
    fuzzy_names: bool = False


@dataclass
class Row:
    """One candidate: what the catalogue has of it, by keyword, and where its instances are. `patients`: only instances
    of these count, of a study that names more than one; None: all."""

    values: dict[str, str]
    studies: list[str]
    patients: frozenset[Identity] | None = None
    series: str = ""
    instance: Instance | None = None
    head: Dataset | None = field(default=None, repr=False)


class Search:
    """`head(instance)` reads the attributes of a stored instance, None if it can't be read now."""

    def __init__(
        self,
        identifier: Dataset,
        model: Model,
        settings: DicomSettings,
        extended: Extended,
        rows: Rows,
        head: Head,
        unreadable: Callable[[int], bool] = lambda _: False,
    ) -> None:
        """`unreadable(seq)`: no node has a good copy of an instance now. Raises BadQuery."""
        self._settings, self._rows, self._head, self._unreadable = settings, rows, head, unreadable
        self.until = float("inf")  # time.monotonic()
        self._model, self.level = model, level_of(identifier, model)
        self._names = "fuzzy" if extended.fuzzy_names else settings.name_matching
        self._keys = [element for element in identifier if element.tag.element != 0 and element.keyword not in IGNORED]
        relational = extended.relational or settings.relational_queries
        self._levels = ALL_LEVELS[: ALL_LEVELS.index(self.level) + 1]
        self._check(identifier, model, relational=relational)
        self.ignored = [key.keyword for key in self._keys if not self._applies(key)]
        """Keys of levels below the query's, which can't be matched (0xFF01 instead of 0xFF00)."""
        applicable = [key for key in self._keys if self._applies(key)]
        self.from_file = [key for key in applicable if key.keyword not in LEVEL_OF]
        """Keys that the catalogue doesn't have."""
        self._matchers: dict[str, Matcher] = {}
        self._texts: dict[str, str] = {}
        for key in applicable:
            if key.keyword in LEVEL_OF and key.keyword not in COUNTS and key.VR != "SQ" and not is_universal(key):
                text = text_of(key.value)
                self._matchers[key.keyword] = matcher(key.VR, text, self._names)
                if text.strip("*\\ ") and dictionary_VR(key.tag) == key.VR:  # else the indexes say nothing of it
                    self._texts[key.keyword] = text
        self._moments = self._combined(identifier) if extended.date_time else []
        self._uids = {level: values_of(identifier, UNIQUE[level]) for level in self._levels}
        days = [(first, last) for date, _, first, last in self._moments if date == "StudyDate"]
        self._plan = Plan(self._texts, self._names, days)
        self._patient_plan = Plan({name: one for name, one in self._texts.items() if name in keys.PATIENT}, self._names)

    def _check(self, identifier: Dataset, model: Model, *, relational: bool) -> None:
        """Hierarchical queries name one entity at each level above (PS3.4 C.4.1.2.1)."""
        if relational:
            return
        for above in model.levels[: model.levels.index(self.level)]:
            if not is_single(values_of(identifier, UNIQUE[above])):
                raise BadQuery(f"{UNIQUE[above]} is needed at level {self.level}, one value")

    def _applies(self, key: DataElement) -> bool:
        return LEVEL_OF.get(key.keyword, self.level) in self._levels

    def _combined(self, identifier: Dataset) -> list[tuple[str, str, str, str]]:
        """Combined date and time matching (PS3.4 C.2.2.2.5.1): both ranges together are one range of moments."""
        moments = []
        for date, hour in PAIRS:
            days, hours = text_of(identifier.get(date)), text_of(identifier.get(hour))
            if date in self._matchers and hour in self._matchers and "-" in days and "-" in hours:
                (first, last), (begin, end) = bounds("DA", days), bounds("TM", hours)
                moments.append((date, hour, first and first + begin, last and last + (end or "235959")))
                del self._matchers[date], self._matchers[hour]
                self._texts.pop(date, None)
                self._texts.pop(hour, None)
        return moments

    # -- candidates --------------------------------------------------------------------------------------------

    def matches(self) -> Iterator[Row | None]:
        """What matches. Blocks; call from a worker thread. None where nothing was found up to `until`: whoever asks may
        go on or not."""
        rows = {
            "PATIENT": self._patients,
            "STUDY": self._studies,
            "SERIES": self._series,
            "IMAGE": self._instances,
        }[self.level]()
        for row in rows:
            if row is not None and self._matches_file(row):
                yield row
            elif time.monotonic() > self.until:
                yield None

    def _patients(self) -> Iterator[Row | None]:
        wanted = self._uids["PATIENT"]
        groups: Iterator[tuple[str, list[str]] | None]
        if is_single(wanted):
            groups = iter([(wanted[0], [uid for uid, _ in self._rows.studies(wanted[0])])])
        else:
            groups = self._rows.patients() if self._patient_plan.is_scan else self._planned_patients()
        for group in groups:
            yield None  # a moment for others, also where nothing matches
            if group is not None:
                yield from self._patients_of(*group)

    def _planned_patients(self) -> Iterator[tuple[str, list[str]] | None]:
        """As `Rows.patients`, of those that an index finds."""
        seen: set[str] = set()
        for found in self._patient_plan.studies(self._rows):
            yield None
            for patient_id in {identity_of(one)[0] for one in found[1].patients} - seen if found else ():
                seen.add(patient_id)
                yield patient_id, [uid for uid, _ in self._rows.studies(patient_id)]

    def _patients_of(self, patient_id: str, studies: list[str]) -> Iterator[Row]:
        """Studies of one Patient ID, by issuer. A patient is answered as in his newest study."""
        known: dict[Identity, list[tuple[tuple[str, str], dict[str, str], str]]] = {}
        for uid in studies:
            row = self._rows.study(uid)
            for patient in row.patients if row else ():
                moment = (row.keys.get("StudyDate", ""), row.keys.get("StudyTime", "")) if row else ("", "")
                known.setdefault(identity_of(patient), []).append((moment, patient, uid))
        for identity, found in known.items():
            matching = [one for one in found if self._matches(one[1], "PATIENT")]
            if matching and identity[0] == patient_id:
                newest = max(matching, key=lambda one: one[0])
                yield Row(dict(newest[1]), sorted({uid for _, _, uid in found}), frozenset((identity,)))

    def _studies(self) -> Iterator[Row | None]:
        for one in self._study_rows():
            if one is None:
                yield None
                continue
            uid, study = one
            patients = study.patients
            matching = [patient for patient in patients if self._matches(patient, "PATIENT")]
            found = {**study.keys, **(matching[0] if matching else {}), "StudyInstanceUID": uid}
            if matching and self._matches(found, "STUDY") and self._gathered_match(uid):
                some = len(matching) < len(patients)
                yield Row(found, [uid], frozenset(identity_of(one) for one in matching) if some else None)
            else:
                yield None

    def _study_rows(self) -> Iterator[tuple[str, StudyRow] | None]:
        patients, studies = self._uids["PATIENT"], self._uids.get("STUDY", [])
        if not studies and "SERIES" in self._levels:
            found = self._studies_of(self._uids.get("SERIES", []), self._uids.get("IMAGE", []))
            if found is None:
                return
            studies = found
        if studies:
            rows = ((uid, self._rows.study(uid)) for uid in dict.fromkeys(studies))
            yield from ((uid, row) for uid, row in rows if row is not None)
        elif is_single(patients):
            yield from self._rows.studies(patients[0])
        else:
            yield from self._plan.studies(self._rows)

    def _studies_of(self, series: list[str], instances: list[str]) -> list[str] | None:
        """Relational queries: the studies in which these series or instances are, None if there are none, [] where none
        were named."""
        found: list[str] = []
        if instances:
            found = [one.put.study for uid in instances if (one := self._rows.instance(uid))]
        elif series:
            found = [study for uid in series for study in self._rows.studies_of_series(uid)]
        return found or (None if series or instances else [])

    def _series(self) -> Iterator[Row | None]:
        for study in self._studies():
            if study is None:
                yield None
                continue
            for uid, row in self._rows.series_of(study.studies[0]):
                found = {**row.keys, **study.values, **self._own(row.keys), "SeriesInstanceUID": uid}
                one = Row(found, study.studies, study.patients, uid)
                if self._matches(found, "SERIES") and (study.patients is None or self._first(one)):
                    yield one
                else:
                    yield None

    def _own(self, found: dict[str, str]) -> dict[str, str]:
        return {keyword: text for keyword, text in found.items() if keyword != "SpecificCharacterSet"}

    def _instances(self) -> Iterator[Row | None]:
        for series in self._series():
            if series is None:
                yield None
                continue
            for instance in self._members(series, series.series):
                put = instance.put
                found = {**series.values, **put.keys, "SOPInstanceUID": put.sop_instance, "SOPClassUID": put.sop_class}
                if self._matches(found, "IMAGE"):
                    yield Row(found, series.studies, series.patients, series.series, instance)
                else:
                    yield None

    # -- matching ----------------------------------------------------------------------------------------------

    def _matches(self, found: dict[str, str], level: str) -> bool:
        for keyword, match in self._matchers.items():
            if LEVEL_OF[keyword] == level and keyword not in GATHERED and not match(found.get(keyword, "")):
                return False
        for date, hour, first, last in self._moments:
            if LEVEL_OF[date] == level:
                day = found.get(date, "")
                moment = day and day + found.get(hour, "")
                if not in_range(moment, first, last):
                    return False
        return True

    def _gathered_match(self, study: str) -> bool:
        return all(
            any(self._matchers[keyword](value) for value in self._gathered(keyword, study))
            for keyword in GATHERED
            if keyword in self._matchers
        )

    def _gathered(self, keyword: str, study: str) -> list[str]:
        if keyword == "ModalitiesInStudy":
            return sorted({row.keys.get("Modality", "") for _, row in self._rows.series_of(study)} - {""})
        return sorted(self._rows.sop_classes(study))

    def _members(self, row: Row, series: str) -> Iterator[Instance]:
        """The instances of a series that are of the row's patients."""
        for study in row.studies:
            of_study = self._rows.study(study) if row.patients is not None else None
            for one in self._rows.instances_of(study, series):
                if row.patients is None or (of_study and self._is_of(one, of_study, row.patients)):
                    yield one

    def _is_of(self, instance: Instance, study: StudyRow, patients: frozenset[Identity]) -> bool:
        return any(belongs(instance.put.keys, study, patient) for patient in patients)

    def _matches_file(self, row: Row) -> bool:
        if not self.from_file:
            return True
        instance = row.instance or self._first(row)
        row.head = self._head(instance) if instance else None
        found = row.head if row.head is not None else Dataset()
        return all(matches_element(key, found, self._names) for key in self.from_file)

    def _first(self, row: Row) -> Instance | None:
        for study in row.studies:
            for series in [row.series] if row.series else [uid for uid, _ in self._rows.series_of(study)]:
                for instance in self._members(row, series):
                    return instance
        return None
