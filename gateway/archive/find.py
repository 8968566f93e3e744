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
from storage.store import Rows

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

Head = Callable[[Instance], Dataset | None]


@dataclass(frozen=True)
class Extended:
    """What was agreed on for a query/retrieve SOP class (PS3.4 C.5.1.1.1, C.5.2.1.1)."""

    relational: bool = False
    date_time: bool = False
    fuzzy_names: bool = False


@dataclass
class Row:
    """One candidate: what the catalogue has of it, by keyword, and where its instances are."""

    values: dict[str, str]
    studies: list[str]
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
    ) -> None:
        """Raises BadQuery."""
        self._settings, self._rows, self._head = settings, rows, head
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
            groups: Iterator[list[str]] = iter([[uid for uid, _ in self._rows.studies(wanted[0])]])
        else:
            groups = self._rows.patients()
        for studies in groups:
            newest = self._rows.study(studies[-1]) if studies else None
            if newest is not None and self._matches(newest.keys, "PATIENT"):
                yield Row(dict(newest.keys), studies)
            else:
                yield None

    def _studies(self) -> Iterator[Row | None]:
        for uid, values in self._study_values():
            found = {**values, "StudyInstanceUID": uid}
            if self._matches(found, "PATIENT") and self._matches(found, "STUDY") and self._gathered_match(uid):
                yield Row(found, [uid])
            else:
                yield None

    def _study_values(self) -> Iterator[tuple[str, dict[str, str]]]:
        patients, studies = self._uids["PATIENT"], self._uids.get("STUDY", [])
        if studies and not any("*" in uid or "?" in uid for uid in studies):
            rows = ((uid, self._rows.study(uid)) for uid in studies)
            yield from ((uid, row.keys) for uid, row in rows if row is not None)
            return
        for uid, row in self._rows.studies(patients[0] if is_single(patients) else None):
            yield uid, row.keys

    def _series(self) -> Iterator[Row | None]:
        for study in self._studies():
            if study is None:
                yield None
                continue
            for uid, row in self._rows.series_of(study.studies[0]):
                found = {**study.values, **row.keys, "SeriesInstanceUID": uid}
                if self._matches(found, "SERIES"):
                    yield Row(found, study.studies, uid)
                else:
                    yield None

    def _instances(self) -> Iterator[Row | None]:
        for series in self._series():
            if series is None:
                yield None
                continue
            for instance in self._rows.instances_of(series.studies[0], series.series):
                put = instance.put
                found = {**series.values, **put.keys, "SOPInstanceUID": put.sop_instance, "SOPClassUID": put.sop_class}
                if self._matches(found, "IMAGE"):
                    yield Row(found, series.studies, series.series, instance)
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
                if not in_range("DT", moment, first, last):
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
        every = (one for series, _ in self._rows.series_of(study) for one in self._members(study, series))
        return sorted({instance.put.sop_class for instance in every})

    def _members(self, study: str, series: str) -> Iterator[Instance]:
        return self._rows.instances_of(study, series)

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
                for instance in self._members(study, series):
                    return instance
        return None

    # -- answers -----------------------------------------------------------------------------------------------

    def _answer(self, row: Row) -> Dataset:
        answer = Dataset()
        for key in self._keys:
            self._fill(answer, key, row)
        answer.QueryRetrieveLevel = self.level
        answer.RetrieveAETitle = self._settings.aet
        answer.InstanceAvailability = "ONLINE"
        for level in self._levels:
            if level in self._model.levels:
                setattr(answer, UNIQUE[level], row.values.get(UNIQUE[level], ""))
        answer.SpecificCharacterSet = self._character_set(answer, row)
        return answer

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
        kept = self._rows
        if keyword == "NumberOfPatientRelatedStudies":
            return len(self._of_patient(row))
        if keyword == "NumberOfSeriesRelatedInstances":
            return kept.count_instances(row.studies[0], row.series)
        studies = self._of_patient(row) if COUNTS[keyword] == "PATIENT" else row.studies
        if keyword.endswith("RelatedSeries"):
            return sum(1 for study in studies for _ in kept.series_of(study))
        return sum(kept.count_instances(study) for study in studies)

    def _of_patient(self, row: Row) -> list[str]:
        if self.level == "PATIENT":
            return row.studies
        return [uid for uid, _ in self._rows.studies(row.values.get("PatientID", ""))]

    def _character_set(self, answer: Dataset, row: Row) -> str | list[str]:
        """UTF-8; or that of the stored data, if the settings say so and it can express the answer."""
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
            if element.VR in ("PN", "LO", "SH", "LT", "ST", "UC", "UT"):
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
