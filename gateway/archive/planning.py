"""Which studies a query has to look at: by the index that leaves the fewest, or all of them where none helps.

What is found is more than what matches; the query compares each row. Whoever asks for what no index has gets all
studies, the newest first.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Final

from gateway.dicom.matching import bounds, matcher
from storage.state.folding import folded, trimmed
from storage.state.indexes import IN_TEXTS, Kind, Range, beginning, days, exactly, value_of
from storage.store import Rows, StudyRow

PROBED: Final = 2000  # an index that leaves no more is taken
PAGE: Final = 200  # rows read at a time
LAST: Final = 9  # rank of looking at all
_WILD: Final = re.compile(r"[*?]")
_PLAIN: Final = {"PatientID": Kind.PATIENT_ID, "AccessionNumber": Kind.ACCESSION, "StudyID": Kind.STUDY_ID}
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

    def numbers(self, rows: Rows) -> Iterator[bytes]:
        found = chain.from_iterable(rows.numbers(one) for one in self.ranges)
        return found if self.once else _distinct(found)


class Plan:
    def __init__(self, wanted: Mapping[str, str], names: str, moments: Iterable[tuple[str, str]] = ()) -> None:
        """`wanted`: text by keyword of each key that doesn't match everything; `names`: how names compare, see
        `matching`; `moments`: ranges of the study's date and time together."""
        self._wanted, self._names = wanted, names
        self._days = [bounds("DA", one) for one in wanted.get("StudyDate", "").split("\\") if one] or list(moments)

    def studies(self, rows: Rows) -> Iterator[Found]:
        """Each once. Blocks."""
        return _read(rows, self._numbers(rows))

    @property
    def is_scan(self) -> bool:
        """Nothing helps: all studies are looked at."""
        return not (self._ways(()) or self._parts())

    def _numbers(self, rows: Rows) -> Iterator[bytes]:
        ways = self._ways(rows.modalities() if any(one in self._wanted for one in _MODALITY) else ())
        few: list[bytes] | None = None
        for way in ways:
            most = PROBED if few is None else len(few)
            found = list(islice(way.numbers(rows), most + 1))
            few = found if len(found) <= most else few
        if few is not None:
            return iter(few)
        best = min(ways, key=lambda way: way.rank, default=Way(tuple(days("", "")), LAST, once=True))
        if best.rank and (parts := self._parts()):
            return _distinct(chain.from_iterable(rows.with_part(part) for part in parts))
        return best.numbers(rows)

    def _ways(self, modalities: Iterable[str]) -> list[Way]:
        found: list[Way] = []
        for keyword, kind in _PLAIN.items():
            found += _by_value(kind, self._wanted.get(keyword, ""), str.strip)
        for keyword, kind in _NAMES.items():
            if wanted := self._wanted.get(keyword, ""):
                found += self._by_name(kind, wanted)
        if self._days:
            ranges = chain.from_iterable(days(*one) for one in self._days)
            found.append(Way(tuple(ranges), 2, once=len(self._days) == 1))
        for keyword in _MODALITY:
            if wanted := self._wanted.get(keyword, ""):
                fits = matcher("CS", wanted)
                fitting = [one for one in modalities if fits(one)]
                ranges = chain.from_iterable(days(*day, one) for one in fitting for day in self._days or [("", "")])
                found.append(Way(tuple(ranges), 1 if self._days else 4, once=len(fitting) == 1 and len(self._days) < 2))
        return found

    def _by_name(self, kind: Kind, wanted: str) -> list[Way]:
        if self._names != "fuzzy":
            return _by_value(kind, wanted, lambda text: trimmed(folded(text)), groups=True)
        if kind is not Kind.NAME:
            return []
        words = [word for word in re.split(r"[=\^\s*?,.\\-]+", folded(wanted)) if word]
        single = "\\" not in wanted  # any of several values may be the one that fits
        return [Way((beginning(Kind.WORD, word),), 3) for word in words if single]

    def _parts(self) -> tuple[bytes, ...]:
        """The longest literal piece, of each alternative of the key that has the longest; () if there is none."""
        best: tuple[bytes, ...] = ()
        for keyword in IN_TEXTS:
            is_name = keyword in _NAMES
            if is_name and self._names == "fuzzy":
                continue
            alternatives = [one for one in self._wanted.get(keyword, "").split("\\") if one]
            parts = tuple(_longest_piece(one, is_name=is_name) for one in alternatives)
            if parts and all(parts) and (not best or min(map(len, parts)) > min(map(len, best))):
                best = parts
        return best


def _by_value(kind: Kind, wanted: str, fold: Callable[[str], str], *, groups: bool = False) -> list[Way]:
    """A way, if each alternative says how the value begins. Of a name with several groups one is enough."""
    ranges: list[Range] = []
    exact = True
    for alternative in filter(None, wanted.split("\\")):
        asked = [fold(one) for one in alternative.split("=")] if groups else [alternative]
        literal = [one for one in asked if one and not _WILD.search(one)]
        prefixes = sorted((piece for one in asked if (piece := _WILD.split(one)[0])), key=len)
        if literal:
            ranges.append(exactly(kind, max(literal, key=len)))
        elif prefixes and _begins(prefixes[-1]):
            ranges.append(beginning(kind, _begins(prefixes[-1])))
            exact = False
        else:
            return []
    return [Way(tuple(ranges), 0 if exact else 3)] if ranges else []


def _begins(text: str) -> str:
    """What is also a beginning of whatever goes on: marks that follow a letter may change places."""
    while text and (text[-1] in "^ " or unicodedata.combining(text[-1])):
        text = text[:-1]
    return text


def _longest_piece(wanted: str, *, is_name: bool) -> bytes:
    pieces: list[str] = []
    for group in wanted.split("=") if is_name else [wanted]:
        for piece in _WILD.split(trimmed(folded(group)) if is_name else folded(group)):
            while piece and unicodedata.combining(piece[0]):
                piece = piece[1:]
            pieces.append(_begins(piece))
    return max((value_of(piece) for piece in pieces), key=len, default=b"")


def _distinct(numbers: Iterable[bytes]) -> Iterator[bytes]:
    seen: set[bytes] = set()
    for number in numbers:
        if number not in seen:
            seen.add(number)
            yield number


def _read(rows: Rows, numbers: Iterator[bytes]) -> Iterator[Found]:
    """The first ones soon, and more at a time after that."""
    size = 8
    while page := list(islice(numbers, size)):
        yield from rows.numbered(page)
        size = min(2 * size, PAGE)
