"""Answers to queries: what was asked for of each match, as a data set or as its bytes."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from pydicom.charset import convert_encodings
from pydicom.datadict import dictionary_has_tag, dictionary_VM, dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import UID
from pydicom.valuerep import IS, DSfloat, PersonName

from gateway.archive.find import COUNTS, GATHERED, LEVEL_OF, Row, Search
from gateway.dicom.elements import encoded_element, encoded_text
from gateway.dicom.identifiers import UNIQUE
from gateway.dicom.matching import element_of, only_asked, text_of
from storage.state import keys
from storage.store import identity_of

UTF_8: Final = "ISO_IR 192"
TEXT_VRS: Final = frozenset(("PN", "LO", "SH", "LT", "ST", "UC", "UT"))
_CHARACTER_SET, _LEVEL, _AET, _AVAILABILITY = 0x00080005, 0x00080052, 0x00080054, 0x00080056
_TAG_OF: Final = {level: keys.ALL[keyword] for level, keyword in UNIQUE.items()}


@dataclass(frozen=True)
class _Form:
    """Of answers: elements that each has, by tag; (tag, VR, keyword) of those that the catalogue has; (tag, VR) of
    those that stand in the file."""

    always: dict[int, tuple[str, bytes]]
    keys: list[tuple[int, str, str]]
    of_file: list[tuple[int, str]]
    implicit: bool


class Query(Search):
    """A search, and the answers to what it finds."""

    @cached_property
    def _forms(self) -> dict[str, _Form | None]:
        """By transfer syntax."""
        return {}

    def run(self) -> Iterator[Dataset | None]:
        """An identifier for each match; None as `matches` says it. Blocks."""
        return (None if row is None else self.answer(row) for row in self.matches())

    def encoded(self, row: Row, transfer_syntax: str) -> bytes | None:
        """The answer as it goes out, without pydicom; None where only that can say it: what isn't one of its VR, what
        stands in another character set, sequences and private elements."""
        form = self._form(transfer_syntax)
        if form is None:
            return None
        found: dict[int, tuple[str, bytes]] = dict(form.always)
        for tag, vr, keyword in form.keys:
            value = encoded_text(vr, self._text_of(keyword, row))
            if value is None:
                return None
            found[tag] = (vr, value)
        for tag, vr in form.of_file:
            text = _plain(element_of(row.head, tag) if row.head is not None else None, vr)
            value = None if text is None else encoded_text(vr, text)
            if value is None:
                return None
            found[tag] = (vr, value)
        if row.instance is not None:
            found[_AVAILABILITY] = ("CS", encoded_text("CS", self._availability(row)) or b"")
        if any(vr in TEXT_VRS and not value.isascii() for vr, value in found.values()):
            found[_CHARACTER_SET] = ("CS", UTF_8.encode())
        return b"".join(encoded_element(tag, *found[tag], implicit=form.implicit) for tag in sorted(found))

    def _form(self, transfer_syntax: str) -> _Form | None:
        """What is the same for all answers; None if they can't be written without pydicom."""
        if transfer_syntax not in self._forms:
            self._forms[transfer_syntax] = self._new_form(UID(transfer_syntax))
        return self._forms[transfer_syntax]

    def _new_form(self, syntax: UID) -> _Form | None:
        if self._settings.response_character_set != "utf-8" or not syntax.is_little_endian:
            return None
        applying = [key for key in self._keys if self._applies(key)]
        if any(not dictionary_has_tag(key.tag) or dictionary_VR(key.tag) != key.VR for key in applying):
            return None
        of_file = [(int(key.tag), key.VR) for key in self.from_file]
        keys_of = {int(key.tag): (key.VR, key.keyword) for key in applying if key.keyword in LEVEL_OF}
        for level in self._levels:
            if level in self._model.levels:
                keys_of[_TAG_OF[level]] = ("LO" if level == "PATIENT" else "UI", UNIQUE[level])
        fixed = {_LEVEL: ("CS", self.level), _AVAILABILITY: ("CS", "ONLINE"), _AET: ("AE", self._settings.aet)}
        always: dict[int, tuple[str, bytes]] = {}
        for tag, (vr, text) in fixed.items():
            value = encoded_text(vr, text)
            if value is None:
                return None
            always[tag] = (vr, value)
        of_catalogue = [(tag, vr, keyword) for tag, (vr, keyword) in keys_of.items()]
        return _Form(always, of_catalogue, of_file, syntax.is_implicit_VR)

    def _text_of(self, keyword: str, row: Row) -> str:
        if keyword in COUNTS:
            return str(self._count(keyword, row))
        if keyword in GATHERED:
            return "\\".join(self._gathered(keyword, row.studies[0]))
        return row.values.get(keyword, "")

    def answer(self, row: Row) -> Dataset:
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


def _plain(element: DataElement | None, vr: str) -> str | None:
    """The value of an element of a file as text; None for one that isn't of this VR, or isn't a text."""
    value = None if element is None else element.value
    if element is None or value is None:
        return ""
    parts = list(value) if isinstance(value, MultiValue) else [value]
    if vr != element.VR or not all(isinstance(one, str | PersonName | DSfloat | IS) for one in parts):
        return None
    text = "\\".join(str(one) for one in parts)
    return text if text == text_of(value) else None


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
