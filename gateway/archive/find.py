"""Queries (PS3.4 C.4.1): from an identifier to answers. The catalogue has the usual attributes of each level; any other
is read from the file of the (first) instance, so that it can be matched and returned at whatever level it is asked for.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from pydicom.charset import convert_encodings
from pydicom.datadict import dictionary_VM, dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from conf.settings import DicomSettings
from gateway.dicom.identifiers import UNIQUE, BadQuery, is_single, level_of, values_of
from gateway.dicom.matching import (
    Matcher,
    bounds,
    element_of,
    in_range,
    is_universal,
    matcher,
    matches_element,
    only_asked,
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


class Query:
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
        self._from_file = [key for key in applicable if key.keyword not in LEVEL_OF]
        self._matchers: dict[str, Matcher] = {}
        for key in applicable:
            if key.keyword in LEVEL_OF and key.keyword not in COUNTS and key.VR != "SQ" and not is_universal(key):
                self._matchers[key.keyword] = matcher(key.VR, text_of(key.value), self._names)
        self._moments = self._combined(identifier) if extended.date_time else []
        self._uids = {level: values_of(identifier, UNIQUE[level]) for level in self._levels}

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
        return moments

    # -- candidates --------------------------------------------------------------------------------------------

    def run(self) -> Iterator[Dataset | None]:
        """Matching answers, one identifier each. Blocks; call from a worker thread. None where nothing was found up to
        `until`: whoever asks may go on or not."""
        rows = {
            "PATIENT": self._patients,
            "STUDY": self._studies,
            "SERIES": self._series,
            "IMAGE": self._instances,
        }[self.level]()
        for row in rows:
            if row is not None and self._matches_file(row):
                yield self._answer(row)
            elif time.monotonic() > self.until:
                yield None

    def _patients(self) -> Iterator[Row | None]:
        wanted = self._uids["PATIENT"]
        if is_single(wanted):
            groups = iter([(wanted[0], [uid for uid, _ in self._rows.studies(wanted[0])])])
        else:
            groups = self._rows.patients()
        for patient_id, studies in groups:
            yield None  # a moment for others, also where nothing matches
            yield from self._patients_of(patient_id, studies)

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
        for uid, study in self._study_rows():
            patients = study.patients
            matching = [patient for patient in patients if self._matches(patient, "PATIENT")]
            found = {**study.keys, **(matching[0] if matching else {}), "StudyInstanceUID": uid}
            if matching and self._matches(found, "STUDY") and self._gathered_match(uid):
                some = len(matching) < len(patients)
                yield Row(found, [uid], frozenset(identity_of(one) for one in matching) if some else None)
            else:
                yield None

    def _study_rows(self) -> Iterator[tuple[str, StudyRow]]:
        patients, studies = self._uids["PATIENT"], self._uids.get("STUDY", [])
        if not studies and "SERIES" in self._levels:
            found = self._studies_of(self._uids.get("SERIES", []), self._uids.get("IMAGE", []))
            if found is None:
                return
            studies = found
        if studies:
            rows = ((uid, self._rows.study(uid)) for uid in dict.fromkeys(studies))
            yield from ((uid, row) for uid, row in rows if row is not None)
            return
        yield from self._rows.studies(patients[0] if is_single(patients) else None)

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
        if not self._from_file:
            return True
        instance = row.instance or self._first(row)
        row.head = self._head(instance) if instance else None
        found = row.head if row.head is not None else Dataset()
        return all(matches_element(key, found, self._names) for key in self._from_file)

    def _first(self, row: Row) -> Instance | None:
        for study in row.studies:
            for series in [row.series] if row.series else [uid for uid, _ in self._rows.series_of(study)]:
                for instance in self._members(row, series):
                    return instance
        return None

    # -- answers -----------------------------------------------------------------------------------------------

    def _answer(self, row: Row) -> Dataset:
        answer = Dataset()
        for key in self._keys:
            try:
                self._fill(answer, key, row)
            except Exception:  # a stored value that isn't one of its VR: the answer goes out without it
                if key.VR != "SQ":
                    answer.add_new(key.tag, key.VR, None)
        answer.QueryRetrieveLevel = self.level
        answer.RetrieveAETitle = self._settings.aet
        answer.InstanceAvailability = self._availability(row)
        self._add_unique(answer, row.values)
        character_set = self._character_set(answer, row)
        if character_set:
            answer.SpecificCharacterSet = character_set
        return answer

    def _add_unique(self, answer: Dataset, values: dict[str, str]) -> None:
        for level in self._levels:
            if level in self._model.levels:
                setattr(answer, UNIQUE[level], values.get(UNIQUE[level], ""))

    def _availability(self, row: Row) -> str:
        """PS3.3 C.4.23.1.1, for one instance; of many it isn't known without a look at each."""
        gone = row.instance is not None and self._unreadable(row.instance.seq)
        return "UNAVAILABLE" if gone else "ONLINE"

    def in_utf_8(self, answer: Dataset) -> Dataset:
        """The same in UTF-8, for one that can't be written in the character set of the stored data."""
        answer.SpecificCharacterSet = UTF_8
        return answer

    def bare(self, answer: Dataset) -> Dataset:
        """Its unique keys only."""
        made = Dataset()
        made.QueryRetrieveLevel = self.level
        for level in self._levels:
            if level in self._model.levels:
                setattr(made, UNIQUE[level], answer.get(UNIQUE[level], ""))
        return made

    def _fill(self, answer: Dataset, key: DataElement, row: Row) -> None:
        keyword = key.keyword
        if not self._applies(key):
            return
        if keyword in COUNTS:
            setattr(answer, keyword, self._count(keyword, row))
        elif keyword in GATHERED:
            setattr(answer, keyword, self._gathered(keyword, row.studies[0]))
        elif keyword in LEVEL_OF:
            _set(answer, keyword, row.values.get(keyword, ""))
        elif row.head is not None and (element := element_of(row.head, key.tag)) is not None:
            answer.add_new(key.tag, element.VR, only_asked(key, element))
        else:
            answer.add_new(key.tag, key.VR, [] if key.VR == "SQ" else None)

    def _count(self, keyword: str, row: Row) -> int:
        if keyword == "NumberOfSeriesRelatedInstances":
            return self._instances_in(row, row.series)
        if COUNTS[keyword] == "PATIENT" and self.level != "PATIENT":
            row = self._whole_patient(row)
        if keyword == "NumberOfPatientRelatedStudies":
            return len(row.studies)
        if keyword.endswith("RelatedSeries"):
            return sum(self._has(row, uid) for study in row.studies for uid, _ in self._rows.series_of(study))
        return self._instances_in(row, None)

    def _instances_in(self, row: Row, series: str | None) -> int:
        """Those of the row's patients; counted one by one only in a study that names several."""
        total = 0
        for study in row.studies:
            of_study = self._rows.study(study) if row.patients is not None else None
            if row.patients is None or (of_study is not None and not of_study.others):
                total += self._rows.count_instances(study, series)
                continue
            every = [series] if series else [uid for uid, _ in self._rows.series_of(study)]
            alone = Row(row.values, [study], row.patients)
            total += sum(1 for uid in every for _ in self._members(alone, uid))
        return total

    def _has(self, row: Row, series: str) -> bool:
        return row.patients is None or any(True for _ in self._members(row, series))

    def _whole_patient(self, row: Row) -> Row:
        """All studies of the patient of a row of a lower level."""
        patient = identity_of(row.values)
        studies = [
            uid
            for uid, study in self._rows.studies(patient[0])
            if any(identity_of(one) == patient for one in study.patients)
        ]
        return Row(row.values, studies, frozenset((patient,)))

    def _character_set(self, answer: Dataset, row: Row) -> str | list[str]:
        """None is needed for plain ASCII; else UTF-8, or that of the stored data, if the settings say so and it can
        express the answer."""
        if all(text_of(element.value).isascii() for element in answer.iterall() if element.VR in TEXT_VRS):
            return ""
        stored = row.values.get("SpecificCharacterSet", "")
        if self._settings.response_character_set == "utf-8" or not stored:
            return UTF_8
        sets = stored.split("\\")
        return (sets if len(sets) > 1 else stored) if _expressible(answer, sets) else UTF_8


def _expressible(answer: Dataset, sets: list[str]) -> bool:
    if "ISO 2022 IR 58" in sets:
        return False  # pydicom writes it without its escape sequences
    try:
        encodings = convert_encodings(sets)
        for element in answer.iterall():
            if element.VR in TEXT_VRS:
                text = text_of(element.value)
                if not text.isascii() and not _encodes(text, encodings):
                    return False
    except (LookupError, ValueError):
        return False
    return True


def _encodes(text: str, encodings: Sequence[str]) -> bool:
    """Each component of a name may be in another set."""
    return all(any(_is_in(part, one) for one in encodings) for part in re.split(r"[\\^=]", text))


def _is_in(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeError, LookupError):
        return False
    return True


def _set(answer: Dataset, keyword: str, text: str) -> None:
    """A number that was stored as something else ("70,5") is returned without a value."""
    try:
        setattr(answer, keyword, from_text(keyword, text))
    except (ValueError, TypeError, OverflowError):
        setattr(answer, keyword, None)


def from_text(keyword: str, text: str) -> object:
    """A value for pydicom from the catalogue's text."""
    if not text:
        return None
    vr = dictionary_VR(keyword)
    if vr in ("US", "SS", "UL", "SL"):
        return int(text)
    if dictionary_VM(keyword) != "1" and "\\" in text:
        return text.split("\\")
    return text
