"""C-FIND, Study Root (PS3.4 C.4.1, C.6.2): levels, matching, and the responses, from the catalogue.

Matching here: universal, single value, list of UID, wildcard, range of dates and times. Person names match without
regard to case.
"""

import fnmatch
import re
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Final

from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag
from pynetdicom.dsutils import decode as decode_dataset
from pynetdicom.dsutils import encode as encode_dataset

from storage import keys
from storage.catalogue import Catalogue

LEVELS: Final = ("STUDY", "SERIES", "IMAGE")
UNIQUE: Final = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}
RANGE_VRS: Final = ("DA", "TM", "DT")
COMPUTED: Final = frozenset(
    (
        "NumberOfStudyRelatedSeries",
        "NumberOfStudyRelatedInstances",
        "NumberOfSeriesRelatedInstances",
        "ModalitiesInStudy",
        "RetrieveAETitle",
        "InstanceAvailability",
        "QueryRetrieveLevel",
        "SpecificCharacterSet",
    )
)


class BadQuery(Exception):
    """The identifier doesn't fit the SOP class (0xA900)."""


class Query:
    def __init__(self, identifier: Dataset, aet: str) -> None:
        """Raises BadQuery."""
        self._aet = aet
        self.level = str(identifier.get("QueryRetrieveLevel", "")).strip().upper()
        if self.level not in LEVELS:
            raise BadQuery(f"QueryRetrieveLevel {self.level[:16]!r} isn't one of Study Root")
        self._asked = [element.tag for element in identifier if element.tag.element != 0]
        self._matchers: dict[str, Callable[[str], bool]] = {}
        self._values: dict[str, str] = {}
        for element in identifier:
            if element.keyword in COMPUTED - {"ModalitiesInStudy"} or element.VR == "SQ":
                continue
            text = _as_text(element.value)
            if text:
                self._values[element.keyword] = text
                self._matchers[element.keyword] = matcher(element.VR, element.keyword, text)
        for above in LEVELS[: LEVELS.index(self.level)]:
            unique = UNIQUE[above]
            if not self._values.get(unique) or re.search(r"[*?\\]", self._values[unique]):
                raise BadQuery(f"{unique} is needed at level {self.level}, one value")

    def run(self, catalogue: Catalogue) -> Iterator[Dataset]:
        """Matching answers, one identifier each. Blocks; call from a worker thread."""
        for study_uid, study in self._studies(catalogue):
            found = {**study, "StudyInstanceUID": study_uid}
            if not self._matches(found, ("PATIENT", "STUDY")) or not self._modality_in(catalogue, study_uid):
                continue
            if self.level == "STUDY":
                yield self._answer(catalogue, found)
                continue
            for series_uid, series in catalogue.series_of(study_uid):
                of_series = {**found, **series.keys, "SeriesInstanceUID": series_uid}
                if not self._matches(of_series, ("SERIES",)):
                    continue
                if self.level == "SERIES":
                    yield self._answer(catalogue, of_series)
                    continue
                for instance in catalogue.instances_of(study_uid, series_uid):
                    put = instance.put
                    of_image = {**of_series, **put.keys}
                    of_image |= {"SOPInstanceUID": put.sop_instance, "SOPClassUID": put.sop_class}
                    if self._matches(of_image, ("IMAGE",)):
                        yield self._answer(catalogue, of_image)

    def _studies(self, catalogue: Catalogue) -> Iterator[tuple[str, dict[str, str]]]:
        wanted = self._values.get("StudyInstanceUID", "")
        patient = self._values.get("PatientID", "")
        if wanted and not re.search(r"[*?]", wanted):
            for uid in wanted.split("\\"):
                row = catalogue.study(uid)
                if row is not None:
                    yield uid, row.keys
        else:
            only = patient if patient and not re.search(r"[*?]", patient) else None
            for uid, row in catalogue.studies(only):
                yield uid, row.keys

    def _matches(self, found: dict[str, str], levels: tuple[str, ...]) -> bool:
        for level in levels:
            for keyword in keys.LEVELS[level]:
                match = self._matchers.get(keyword)
                if match and not match(found.get(keyword, "")):
                    return False
        return True

    def _modality_in(self, catalogue: Catalogue, study: str) -> bool:
        match = self._matchers.get("ModalitiesInStudy")
        return match is None or any(match(modality) for modality in _modalities(catalogue, study))

    def _answer(self, catalogue: Catalogue, found: dict[str, str]) -> Dataset:
        answer = Dataset()
        answer.SpecificCharacterSet = "ISO_IR 192"
        for tag in self._asked:
            self._fill(answer, tag, catalogue, found)
        answer.QueryRetrieveLevel = self.level
        answer.RetrieveAETitle = self._aet
        for level in LEVELS[: LEVELS.index(self.level) + 1]:
            setattr(answer, UNIQUE[level], found[UNIQUE[level]])
        return answer

    def _fill(self, answer: Dataset, tag: BaseTag, catalogue: Catalogue, found: dict[str, str]) -> None:
        keyword = keyword_for_tag(tag)
        study, series = found["StudyInstanceUID"], found.get("SeriesInstanceUID")
        match keyword:
            case "" | "SpecificCharacterSet" | "QueryRetrieveLevel" | "RetrieveAETitle":
                return
            case "InstanceAvailability":
                value: object = "ONLINE"
            case "ModalitiesInStudy":
                value = sorted(_modalities(catalogue, study))
            case "NumberOfStudyRelatedSeries":
                value = sum(1 for _ in catalogue.series_of(study))
            case "NumberOfStudyRelatedInstances":
                value = catalogue.count_instances(study)
            case "NumberOfSeriesRelatedInstances":
                value = catalogue.count_instances(study, series) if series else None
            case _:
                value = _from_text(keyword, found.get(keyword, ""))
        setattr(answer, keyword, value)


def _from_text(keyword: str, text: str) -> object:
    if keyword in ("Rows", "Columns", "BitsAllocated"):
        return int(text) if text else None
    if keyword == "OtherPatientIDs":
        return text.split("\\")
    return text or None


def _modalities(catalogue: Catalogue, study: str) -> set[str]:
    return {row.keys.get("Modality", "") for _, row in catalogue.series_of(study)} - {""}


def _as_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple) or type(value).__name__ == "MultiValue":
        return "\\".join(str(part) for part in value)  # type: ignore[attr-defined]
    return str(value).strip()


def matcher(vr: str, keyword: str, wanted: str) -> Callable[[str], bool]:
    """A test for one key (PS3.4 C.2.2.2). A value without text matches only universal matching."""
    if wanted.strip("*") == "":
        return lambda _text: True
    if vr == "UI":
        uids = frozenset(wanted.split("\\"))
        return lambda text: text in uids
    if vr in RANGE_VRS and "-" in wanted:
        low, _, high = (part.strip().replace(":", "") for part in wanted.partition("-"))
        return lambda text: _in_range(text, low, high)
    fold = vr == "PN"
    if "*" in wanted or "?" in wanted:
        pattern = re.compile(_glob(wanted), re.IGNORECASE if fold else 0)
        return lambda text: pattern.fullmatch(text) is not None
    if fold:
        plain = wanted.casefold().rstrip("^= ")
        return lambda text: text.casefold().rstrip("^= ") == plain
    return lambda text: wanted in [part.strip() for part in text.split("\\")]


def _glob(wanted: str) -> str:
    """Only * and ? are special in DICOM (PS3.4 C.2.2.2.4)."""
    return fnmatch.translate(wanted.replace("[", "[[]"))


def _in_range(text: str, low: str, high: str) -> bool:
    value = text.replace(":", "")
    if not value or (low and value < low):
        return False
    return not high or value[: len(high)] <= high


def decode_identifier(data: bytes, transfer_syntax: str) -> Dataset:
    """Raises BadQuery."""
    little = transfer_syntax != "1.2.840.10008.1.2.2"
    try:
        identifier: Dataset = decode_dataset(BytesIO(data), transfer_syntax == "1.2.840.10008.1.2", little)
        return identifier
    except Exception as error:  # pydicom raises whatever a malformed identifier leads it to
        raise BadQuery(f"the identifier can't be read: {type(error).__name__}") from error


def encode_identifier(answer: Dataset, transfer_syntax: str) -> bytes:
    little = transfer_syntax != "1.2.840.10008.1.2.2"
    encoded: bytes | None = encode_dataset(answer, transfer_syntax == "1.2.840.10008.1.2", little)
    if encoded is None:
        raise ValueError("an answer can't be encoded")
    return encoded
