"""Which studies a query has to look at: by the index that leaves the fewest, or all of them where none helps.

What is found is more than what matches; the query compares each row. Whoever asks for what no index has gets all
studies, the newest first.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Final

from gateway.dicom.matching import bounds, matcher
from storage.state.folding import folded, trimmed
from storage.state.indexes import IN_TEXTS, ODD, PLAIN, Kind, Range, beginning, born, days, exactly, value_of
from storage.store import Rows, StudyRow

PROBED: Final = 2000  # an index that leaves no more is taken
PROBED_FAR: Final = 20_000  # if none does, one that leaves no more than these
ALTERNATIVES: Final = 64  # beginnings; of more, all studies are looked at
PARTS: Final = 8  # the same of parts of words, for each of which all texts are read
PART_BYTES: Final = 3  # shorter ones are everywhere
PAGE: Final = 200  # rows read at a time
# Ranks of ways that leave many.
EQUAL, BEGINNING, PARTS_OF_WORDS, DAY_AND_MODALITY, DAYS, SHORT_BEGINNING, MODALITY, SHORT_PARTS, LAST = range(9)
_WILD: Final = re.compile(r"[*?]")
_DAY: Final = re.compile(r"[0-9]{8}")
_NAMES: Final = {"PatientName": Kind.NAME, "ReferringPhysicianName": Kind.REFERRING}
_MODALITY: Final = ("ModalitiesInStudy", "Modality")

Found = tuple[str, StudyRow]


@dataclass(frozen=True)
class Way:
    """Ranges of an index that together have all that can match; of two long ones that with the lower `rank`. `once`:
    no study is in them twice."""

    ranges: tuple[Range, ...]
    rank: int
    once: bool = False

    def numbers(self, rows: Rows) -> Iterator[bytes | None]:
        found = chain.from_iterable(rows.numbers(one) for one in self.ranges)
        return found if self.once else _distinct(found)


class Plan:
    def __init__(self, wanted: Mapping[str, str], names: str, moments: Iterable[tuple[str, str]] = ()) -> None:
        """`wanted`: text by keyword of each key that doesn't match everything; `names`: how names compare, see
        `matching`; `moments`: ranges of the study's date and time together."""
        self._wanted, self._names = wanted, names
        self._days = [bounds("DA", one) for one in wanted.get("StudyDate", "").split("\\") if one] or list(moments)

    def studies(self, rows: Rows) -> Iterator[Found | None]:
        """Each once. Blocks. None now and then: a moment for others."""
        return _read(rows, self._numbers(rows))

    @property
    def is_scan(self) -> bool:
        """Nothing helps: all studies are looked at."""
        return not (self._ways(()) or self._parts())

    def _numbers(self, rows: Rows) -> Iterator[bytes | None]:
        ways = self._ways(rows.modalities() if any(one in self._wanted for one in _MODALITY) else ())
        few: list[bytes] | None = None
        for most in (PROBED, PROBED_FAR):
            for way in ways if few is None else ():
                found: list[bytes] = []
                at_most = most if few is None else len(few)
                for number in way.numbers(rows):
                    if number is None:
                        yield None
                    else:
                        found.append(number)
                    if len(found) > at_most:
                        break
                else:
                    few = found
        if few is not None:
            yield from few
            return
        best = min(ways, key=lambda way: way.rank, default=Way(tuple(days("", "")), LAST, once=True))
        parts = self._parts()
        if parts and best.rank > (PARTS_OF_WORDS if min(map(len, parts)) >= PART_BYTES else SHORT_PARTS):
            yield from _distinct(chain.from_iterable(rows.with_part(part) for part in parts))
        else:
            yield from best.numbers(rows)

    def _ways(self, modalities: Iterable[str]) -> list[Way]:
        found: list[Way] = []
        for keyword, kind in PLAIN.items():
            found += _by_value(kind, self._wanted.get(keyword, ""), str.strip)
        for keyword, kind in _NAMES.items():
            if wanted := self._wanted.get(keyword, ""):
                found += self._by_name(kind, wanted)
        if wanted := self._wanted.get("PatientBirthDate", ""):
            found += _by_birth(wanted)
        if self._days:
            ranges = chain.from_iterable(days(*one) for one in self._days)
            found.append(Way(tuple(ranges), self._rank(DAYS), once=len(self._days) == 1))
        for keyword in _MODALITY:
            if wanted := self._wanted.get(keyword, ""):
                fits = matcher("CS", wanted)
                fitting = [one for one in modalities if one == ODD or fits(one)]
                ranges = chain.from_iterable(days(*day, one) for one in fitting for day in self._days or [("", "")])
                found.append(
                    Way(tuple(ranges), self._rank(DAY_AND_MODALITY), once=len(fitting) == 1 and len(self._days) < 2)
                )
        return found

    def _rank(self, bounded: int) -> int:
        """Of ranges of days: those that are open at an end, or not given, may have everything."""
        return bounded if self._days and all(first and last for first, last in self._days) else MODALITY

    def _by_name(self, kind: Kind, wanted: str) -> list[Way]:
        if self._names != "fuzzy":
            return _by_value(kind, wanted, lambda text: trimmed(folded(text)), groups=True)
        if kind is not Kind.NAME:
            return []
        text = folded(wanted)
        words = [word for word in re.split(r"[=\^\s*?,.-]+", text) if word]
        single = "\\" not in text  # any of several values may be the one that fits
        ranks = {word: BEGINNING if len(value_of(word)) >= PART_BYTES else SHORT_BEGINNING for word in words}
        return [Way((beginning(Kind.WORD, word),), rank) for word, rank in ranks.items() if single]

    def _parts(self) -> tuple[bytes, ...]:
        """The longest literal piece, of each alternative of the key that has the longest; () if there is none."""
        best: tuple[bytes, ...] = ()
        for keyword in IN_TEXTS:
            is_name = keyword in _NAMES
            if is_name and self._names == "fuzzy":
                continue
            alternatives = dict.fromkeys(one for one in self._wanted.get(keyword, "").split("\\") if one)
            parts = tuple(dict.fromkeys(_longest_piece(one, is_name=is_name) for one in alternatives))
            if (
                parts
                and len(parts) <= PARTS
                and all(parts)
                and (not best or min(map(len, parts)) > min(map(len, best)))
            ):
                best = parts
        return best


def _by_value(kind: Kind, wanted: str, fold: Callable[[str], str], *, groups: bool = False) -> list[Way]:
    """A way, if each alternative says how the value begins. Of a name with several groups one is enough."""
    ranges: dict[Range, None] = {}
    begun, shortest = 0, PART_BYTES
    for alternative in filter(None, dict.fromkeys(wanted.split("\\"))):
        asked = [fold(one) for one in alternative.split("=")] if groups else [alternative]
        literal = [one for one in asked if one and not _WILD.search(one)]
        prefixes = sorted((piece for one in asked if (piece := _WILD.split(one)[0])), key=len)
        if literal:
            ranges[exactly(kind, max(literal, key=len))] = None
        elif prefixes and _begins(prefixes[-1]):
            ranges[beginning(kind, _begins(prefixes[-1]))] = None
            begun, shortest = begun + 1, min(shortest, len(value_of(_begins(prefixes[-1]))))
        else:
            return []
    if not ranges or begun > ALTERNATIVES:
        return []
    return [Way(tuple(ranges), EQUAL if not begun else BEGINNING if shortest >= PART_BYTES else SHORT_BEGINNING)]


def _by_birth(wanted: str) -> list[Way]:
    """A way, if each alternative is a day, or has a first and a last one."""
    between = [bounds("DA", one) for one in dict.fromkeys(wanted.split("\\")) if one]
    if len(between) > ALTERNATIVES or not all(_DAY.fullmatch(end) for one in between for end in one):
        return []
    ranges = dict.fromkeys(chain.from_iterable(born(*one) for one in between))
    return [Way(tuple(ranges), EQUAL if all(first == last for first, last in between) else BEGINNING)]


def _begins(text: str) -> str:
    """What is also a beginning of whatever goes on: marks that follow a letter may change places."""
    while text and (text[-1] in "^ " or unicodedata.combining(text[-1])):
        text = text[:-1]
    return text


def _longest_piece(wanted: str, *, is_name: bool) -> bytes:
    pieces: list[str] = []
    for group in wanted.split("=") if is_name else [wanted]:
        for piece in _WILD.split(trimmed(folded(group)) if is_name else folded(group)):
            while piece and (piece[0] in "^ " or unicodedata.combining(piece[0])):
                piece = piece[1:]
            pieces.append(_begins(piece))
    return max((value_of(piece) for piece in pieces), key=len, default=b"")


def _distinct(numbers: Iterable[bytes | None]) -> Iterator[bytes | None]:
    seen: set[bytes] = set()
    for number in numbers:
        if number is None:
            yield None
        elif number not in seen:
            seen.add(number)
            yield number


def _read(rows: Rows, numbers: Iterable[bytes | None]) -> Iterator[Found | None]:
    """The first ones soon, and more at a time after that."""
    page: list[bytes] = []
    size = 8
    for number in numbers:
        if number is not None:
            page.append(number)
        if len(page) >= size or number is None:
            yield from rows.numbered(page)
            size = min(2 * size, PAGE)
            page = []
        if number is None:
            yield None
    yield from rows.numbered(page)
