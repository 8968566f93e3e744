"""By what studies are found without reading all of them.

Table `index` has a row for each value of a study that is asked for: kind, value, 0, number of the study. `days` has all
studies by their moment, and `modalities` by modality and moment, with how many series of it a study has. `texts` has
what parts of words are looked for in: the folded texts of 64 studies in a row, so that all of them are read in one go.
A study is a number in these, this node's own: `numbered` has its UID, `study_number` the number.

All are made from the rows of studies and series, in the transaction that changes those, and nothing else is in them.
What they find is more than what matches: who asks compares the rows.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from storage.state import instances
from storage.state.folding import digits_of, fold, folded, trimmed, words_of
from storage.state.kv import Transaction

# By which rules they were made: ours, and Unicode's as this Python has them. Those of others are made anew.
RULES: Final = f"2, Unicode {unicodedata.unidata_version}"
TABLES: Final = ("index", "days", "modalities", "texts", "numbered", "study_number")
NUMBER_BYTES: Final = 5
VALUE_BYTES_MAX: Final = 200  # of a value in a key; LMDB's keys have 511
AT_ONCE: Final = 64  # studies in a row of `texts`
NO_MOMENT: Final = b"0" * 14  # of a study whose date isn't one day
NO_DATE: Final = b"!" * 14  # of one that has none: no range of days has it
ODD: Final = "\x7f"  # a modality that is no code, a date of birth that isn't one day
COUNT_BYTES: Final = 4
DAY_DIGITS: Final = 8
_END: Final = b"\0"  # behind a value, and before each study in a row of `texts`
_BETWEEN: Final = "\1"  # two texts of a study

Keys = dict[str, str]


class Said(Protocol):
    """The row of a study, see `rows.StudyRow`."""

    @property
    def keys(self) -> Keys: ...
    @property
    def patients(self) -> list[Keys]: ...


class Kind(Enum):
    """What a row of `index` says of a study. `NAME`: a group of the patient's name; `WORD`: one word of it."""

    ACCESSION = b"a"
    STUDY_ID = b"s"
    PATIENT_ID = b"i"
    NAME = b"n"
    WORD = b"w"
    REFERRING = b"r"
    BIRTH = b"b"


# Keys whose values stand in `index` as they are.
PLAIN: Final = {"AccessionNumber": Kind.ACCESSION, "StudyID": Kind.STUDY_ID, "PatientID": Kind.PATIENT_ID}
IN_TEXTS: Final = (
    *("PatientName", "PatientID", "OtherPatientIDs"),
    *("AccessionNumber", "StudyID", "StudyDescription", "ReferringPhysicianName"),
)
_NAMES: Final = frozenset(("PatientName", "ReferringPhysicianName"))


def value_of(text: str) -> bytes:
    """As it stands in a key: the beginning of what is long."""
    return text.replace("\0", " ").encode("utf-8", "surrogatepass")[:VALUE_BYTES_MAX]


def groups_of(name: str) -> list[str]:
    """The folded groups of all values of a person name."""
    found = (trimmed(folded(group)) for value in name.split("\\") for group in value.split("="))
    return [group for group in found if group]


def moment_of(keys: Keys) -> bytes:
    """Date and time of a study in digits; NO_DATE where it has none, NO_MOMENT for several or less than a day."""
    day = digits_of(keys.get("StudyDate", ""))
    if not keys.get("StudyDate", "").strip("\\ "):
        return NO_DATE
    if not re.fullmatch(r"[0-9]{8}", day):
        return NO_MOMENT
    hour = re.match(r"[0-9]{0,6}", digits_of(keys.get("StudyTime", "")))
    return (day + (hour[0] if hour else "").ljust(6, "0")).encode()


def _rows_of(said: Said | None) -> set[bytes]:
    """Kind and value of each row of `index`."""
    if said is None:
        return set()
    found: set[tuple[Kind, str]] = set()
    patients = said.patients
    for keys in (*patients, said.keys):
        for keyword, kind in PLAIN.items():
            found |= {(kind, value.strip()) for value in keys.get(keyword, "").split("\\")}
    for keys in patients:
        for group in groups_of(keys.get("PatientName", "")):
            found |= {(Kind.NAME, group), *((Kind.WORD, word) for word in words_of(group))}
        found |= {(Kind.BIRTH, _day(value)) for value in keys.get("PatientBirthDate", "").split("\\") if value.strip()}
    found |= {(Kind.REFERRING, group) for group in groups_of(said.keys.get("ReferringPhysicianName", ""))}
    return {kind.value + value_of(text) + _END for kind, text in found if text}


def _day(text: str) -> str:
    day = digits_of(text)
    return day if re.fullmatch(r"[0-9]{8}", day) else ODD


def _text_of(said: Said | None) -> bytes:
    """In what of a study parts of words are looked for."""
    if said is None:
        return b""
    texts: list[str] = []
    for keys in (*said.patients, said.keys):
        for keyword in IN_TEXTS:
            text = keys.get(keyword, "")
            texts += groups_of(text) if keyword in _NAMES else [fold(text)] if text else []
    return _BETWEEN.join(dict.fromkeys(texts)).replace("\0", " ").encode("utf-8", "surrogatepass")


# -- kept --------------------------------------------------------------------------------------------------------------


def number_of(txn: Transaction, study: str) -> bytes | None:
    return txn.get("study_number", instances.key_of(study))


def changed(txn: Transaction, study: str, before: Said | None, after: Said | None) -> None:
    """The row of a study comes (`before` None), says something else, or goes, when it has no series any more."""
    number = number_of(txn, study)
    if number is None:
        if after is None:
            return
        last = txn.last_key("numbered")
        number = (int.from_bytes(last, "big") + 1 if last else 1).to_bytes(NUMBER_BYTES, "big")
        txn.append("numbered", number, study.encode())
        txn.put("study_number", instances.key_of(study), number)
    old, new = _rows_of(before), _rows_of(after)
    for row in old - new:
        txn.delete("index", row + number)
    for row in new - old:
        txn.put("index", row + number, b"")
    _change_moment(txn, number, moment_of(before.keys) if before else None, moment_of(after.keys) if after else None)
    if (text := _text_of(after)) != _text_of(before):
        _change_text(txn, number, text)
    if after is None:
        txn.delete("numbered", number)
        txn.delete("study_number", instances.key_of(study))


def _change_moment(txn: Transaction, number: bytes, before: bytes | None, after: bytes | None) -> None:
    if before == after:
        return
    if before is not None:
        txn.delete("days", before + number)
    if after is not None:
        txn.put("days", after + number, b"")
    if before is None or after is None:
        return
    for modality in list(modalities(txn)):
        counted = txn.get("modalities", _of_modality(modality) + before + number)
        if counted is not None:
            txn.delete("modalities", _of_modality(modality) + before + number)
            txn.put("modalities", _of_modality(modality) + after + number, counted)


def count_series(txn: Transaction, study: str, said: Said, modality: str, more: int) -> None:
    """A study, whose row says this now, has one series of a modality more, or less."""
    number = number_of(txn, study)
    if number is None:
        return
    for value in {_code(value) for value in modality.split("\\")} - {""}:
        key = _of_modality(value) + moment_of(said.keys) + number
        raw = txn.get("modalities", key)
        count = (int.from_bytes(raw, "big") if raw else 0) + more
        if count > 0:
            txn.put("modalities", key, count.to_bytes(COUNT_BYTES, "big"))
        else:
            txn.delete("modalities", key)


def _code(modality: str) -> str:
    modality = modality.strip()
    return modality if re.fullmatch(r"[ -~]{0,16}", modality) else ODD


def _of_modality(code: str) -> bytes:
    return code.encode() + _END


def _change_text(txn: Transaction, number: bytes, text: bytes) -> None:
    key, own = _row_of_texts(number)
    raw = txn.get("texts", key) or b""
    texts = {one[0]: one[1:] for one in raw.split(_END)[1:]}
    texts.pop(own, None)
    if text:
        texts[own] = text
    if texts:
        txn.put("texts", key, b"".join(_END + bytes([one]) + texts[one] for one in sorted(texts)))
    else:
        txn.delete("texts", key)


def _row_of_texts(number: bytes) -> tuple[bytes, int]:
    """The key of the row in which a study's is, and its place in it, which is no `_END`."""
    row, place = divmod(int.from_bytes(number, "big"), AT_ONCE)
    return row.to_bytes(NUMBER_BYTES, "big"), place + 2


# -- asked -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Rows of a table from key `low` to before `high`, each with a study's number at its end; `newest`: the last one
    first."""

    table: str
    low: bytes
    high: bytes
    newest: bool = False


def exactly(kind: Kind, text: str) -> Range:
    low = kind.value + value_of(text) + _END
    return Range("index", low, low[:-1] + b"\1")


def beginning(kind: Kind, text: str) -> Range:
    low = kind.value + value_of(text)
    return Range("index", low, low + b"\xff")


def born(first: str, last: str) -> list[Range]:
    """Studies of patients who were born on these days, and those whose date of birth is no day."""
    between = Range("index", Kind.BIRTH.value + value_of(first), Kind.BIRTH.value + value_of(last) + b"\xff")
    return [between, exactly(Kind.BIRTH, ODD)]


def days(first: str, last: str, modality: str = "") -> list[Range]:
    """Studies of these days, newest first, "" where a range is open, and those whose date is no day, or that have none
    if it is open at both ends; `modality`: that have a series of it."""
    before = _of_modality(modality) if modality else b""
    table = "modalities" if modality else "days"
    low, high = (end[:DAY_DIGITS].encode("utf-8", "surrogatepass") for end in (first, last))
    if high and not low:
        low = NO_MOMENT
    found = Range(table, before + low, before + (high or b"9") + b"\xff", newest=True)
    if found.low <= before + NO_MOMENT < found.high:
        return [found]
    return [found, Range(table, before + NO_MOMENT, before + NO_MOMENT + b"\xff" * (NUMBER_BYTES + 1))]


def numbers(txn: Transaction, asked: Range, after: bytes = b"") -> Iterator[bytes]:
    """Keys of a range, of which the last `NUMBER_BYTES` are a study's number; behind a key that was seen."""
    if asked.newest:
        for key, _ in txn.scan_back(asked.table, after or asked.high):
            if key < asked.low:
                return
            yield key
        return
    for key, _ in txn.scan(asked.table, after + b"\0" if after else asked.low):
        if key >= asked.high:
            return
        yield key


def parts(txn: Transaction, part: bytes, after: bytes = b"") -> Iterator[tuple[bytes, list[bytes]]]:
    """(key of a row of `texts`, numbers of the studies in it whose texts have this part, not empty, somewhere), of each
    row behind one that was seen."""
    for key, raw in txn.scan("texts", after + b"\0" if after else b""):
        yield key, list(_in_row(int.from_bytes(key, "big"), raw, part))


def _in_row(row: int, raw: bytes, part: bytes) -> Iterator[bytes]:
    at = raw.find(part)
    while at >= 0:
        place = raw[raw.rfind(_END, 0, at + 1) + 1] - 2
        yield (row * AT_ONCE + place).to_bytes(NUMBER_BYTES, "big")
        end = raw.find(_END, at + 1)
        at = raw.find(part, end) if end >= 0 else -1


def modalities(txn: Transaction) -> Iterator[str]:
    """Those that there are, ODD for any other."""
    start = b""
    while (key := next((key for key, _ in txn.scan("modalities", start)), None)) is not None:
        modality = key[: key.index(_END)]
        yield modality.decode("ascii")
        start = modality + b"\1"
