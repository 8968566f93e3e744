"""Attribute matching (PS3.4 C.2.2.2): universal, single value, list of UID, wild card, range, sequence.

Attributes are texts, several values joined by a backslash, as the catalogue keeps them. How person names compare is a
setting: `exact`; `folded`, without regard to case, accents and width; `fuzzy`, where each word asked for begins a word
of the name, in any order.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Final

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from gateway.dicom.identify import without_escapes
from storage.state.folding import digits_of, folded, trimmed, words_of

Matcher = Callable[[str], bool]

WILD_VRS: Final = frozenset(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"))
NUMBER_VRS: Final = frozenset(("IS", "DS", "US", "SS", "UL", "SL", "FL", "FD", "UV", "SV"))
RANGE_VRS: Final = frozenset(("DA", "TM", "DT"))
_DATE_TIME: Final = r"\d{4,14}(?:\.\d{1,6})?(?:[+-](?:0\d|1[0-4])[0-5]\d)?"
_SINGLE_DT: Final = re.compile(_DATE_TIME)
_RANGE_DT: Final = re.compile(rf"({_DATE_TIME})?\s*-\s*({_DATE_TIME})?")


def text_of(value: object) -> str:
    """A value of a data element as text."""
    if value is None:
        return ""
    if isinstance(value, list | tuple | MultiValue):
        return "\\".join(text_of(part) for part in value)
    if isinstance(value, bytes):
        return value.decode("latin-1").strip(" \0")
    return without_escapes(str(value)).strip(" \0")


def matcher(vr: str, wanted: str, names: str = "folded") -> Matcher:
    """A test for one key. Without `wanted` everything matches, also what has no value."""
    if wanted.strip("*\\ ") == "":
        return lambda _text: True
    if vr == "UI":
        uids = frozenset(wanted.split("\\"))
        return lambda text: text in uids
    alternatives = [_single(vr, one, names) for one in wanted.split("\\") if one]
    return lambda text: any(match(value) for value in _values(vr, text) for match in alternatives)


def _values(vr: str, text: str) -> list[str]:
    return [part.strip() for part in text.split("\\")] if vr not in ("LT", "ST", "UT", "UR") else [text]


def _single(vr: str, wanted: str, names: str) -> Matcher:
    if vr in RANGE_VRS:
        return _moment(vr, wanted)
    if vr == "PN":
        return _name(wanted, names)
    if vr in WILD_VRS and ("*" in wanted or "?" in wanted):
        pattern = glob(wanted)
        return lambda text: bool(text) and pattern(text)
    if vr in NUMBER_VRS:
        number = _number(wanted)
        return lambda text: text == wanted or (number is not None and _number(text) == number)
    return lambda text: text == wanted


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def glob(wanted: str) -> Matcher:
    """Only * and ? are special in DICOM (PS3.4 C.2.2.2.4). What stands between two * is looked for once, from the left:
    time grows with the length of the text, whatever is asked."""
    first, *middle = wanted.split("*")
    if not middle:
        return lambda text: len(text) == len(first) and _at(text, first, 0)
    *inner, last = middle
    least = len(first) + len(last)

    def match(text: str) -> bool:
        end = len(text) - len(last)
        if len(text) < least or not _at(text, first, 0) or not _at(text, last, end):
            return False
        at = len(first)
        for part in inner:
            found = _find(text, part, at, end)
            if found < 0:
                return False
            at = found + len(part)
        return at <= end

    return match


def _at(text: str, part: str, at: int) -> bool:
    if "?" not in part:
        return text.startswith(part, at)
    here = text[at : at + len(part)]
    return len(here) == len(part) and all(one in ("?", other) for one, other in zip(part, here, strict=True))


def _find(text: str, part: str, start: int, end: int) -> int:
    if "?" not in part:
        return text.find(part, start, end)
    return next((at for at in range(start, end - len(part) + 1) if _at(text, part, at)), -1)


# -- dates and times ---------------------------------------------------------------------------------------------------


def _moment(vr: str, wanted: str) -> Matcher:
    low, high = bounds(vr, wanted)
    return lambda text: in_range(text, low, high)


def bounds(vr: str, wanted: str) -> tuple[str, str]:
    """(from, to) of a range or a single value, "" where it is open."""
    if vr == "DT":
        text = wanted.strip()
        found = None if _SINGLE_DT.fullmatch(text) else _RANGE_DT.fullmatch(text)
        low, high = (found[1] or "", found[2] or "") if found else (text, text)
        return digits_of(low), digits_of(high)
    if "-" not in wanted:
        one = digits_of(wanted)
        return one, one
    low, _, high = wanted.partition("-")
    return digits_of(low), digits_of(high)


def in_range(text: str, low: str, high: str) -> bool:
    """Both ends are of it, as far as they say: 10 to 12 ends at 12:59:59. So is a value as far as it says: a time of
    1030 is of 103000 to 103059, a date of 2026 of each of its days."""
    value = digits_of(text)
    if not value or (low and value < low[: len(value)]):
        return False
    return not high or value[: len(high)] <= high


# -- names -------------------------------------------------------------------------------------------------------------


def _name(wanted: str, names: str) -> Matcher:
    """The groups of a name (alphabetic, ideographic, phonetic) are matched each for itself: whichever fits."""
    fold: Callable[[str], str] = folded if names != "exact" else lambda text: unicodedata.normalize("NFC", text)
    groups = [trimmed(fold(group)) for group in wanted.split("=")]
    if names == "fuzzy":
        words = [word for group in groups for word in re.split(r"[\^\s*?,.-]+", group) if word]
        return lambda text: _begins_words(words, fold(text))
    tests = [_group(group) for group in groups]

    def match(text: str) -> bool:
        has = [trimmed(fold(group)) for group in text.split("=")]
        if len(tests) == 1:
            return any(tests[0](group) for group in has if group)
        return all(
            not wanted_group or (number < len(has) and test(has[number]))
            for number, (wanted_group, test) in enumerate(zip(groups, tests, strict=True))
        )

    return match


def _group(wanted: str) -> Matcher:
    if "*" in wanted or "?" in wanted:
        return glob(wanted)
    return lambda group: group == wanted


def _begins_words(wanted: list[str], text: str) -> bool:
    words = words_of(text)
    return all(any(word.startswith(one) for word in words) for one in wanted)


# -- elements of data sets ---------------------------------------------------------------------------------------------


def is_universal(key: DataElement) -> bool:
    """It asks for the value and matches whatever there is."""
    if key.VR == "SQ":
        return all(is_universal(inner) for item in key.value or () for inner in item)
    return text_of(key.value).strip("*") == ""


def element_of(found: Dataset, tag: int) -> DataElement | None:
    """None also for one whose value can't be read: pydicom decodes it when asked, and raises whatever that leads to."""
    try:
        element: DataElement | None = found.get(tag)
    except Exception:
        return None
    return element


def matches_element(key: DataElement, found: Dataset, names: str) -> bool:
    """A key against a data set; sequence matching compares the item asked for with each item (PS3.4 C.2.2.2.6)."""
    if is_universal(key):
        return True
    element = element_of(found, key.tag)
    if element is None:
        return False
    if key.VR == "SQ":
        items = (element.value or ()) if element.VR == "SQ" else ()
        return any(all(matches_element(inner, item, names) for inner in key.value[0]) for item in items)
    vr = key.VR if key.VR != "UN" else element.VR  # a private key in implicit VR doesn't say what it is
    return matcher(vr, text_of(key.value), names)(text_of(element.value))


def only_asked(key: DataElement, element: DataElement) -> object:
    """The value of an answer: of a sequence only what was asked for of its items."""
    if key.VR != "SQ" or not key.value or not len(key.value[0]):
        return element.value
    return [_part(item, key.value[0]) for item in element.value or ()]


def _part(item: Dataset, keys: Iterable[DataElement]) -> Dataset:
    part = Dataset()
    for key in keys:
        found = element_of(item, key.tag)
        if found is None:
            part.add_new(key.tag, key.VR, None if key.VR != "SQ" else [])
        else:
            part.add_new(key.tag, found.VR, only_asked(key, found))
    return part
