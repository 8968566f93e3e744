"""The state of one node given to the other, by ranges of keys.

Who takes asks for each table from a key on, with the digest of the rows that it has itself there; who gives answers
from a snapshot, and sends rows only where they differ. What a node says of its own copies is never given: of entries
that are new to it, it has none.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Final

import msgspec
import xxhash

from storage.replication.epochs import Epochs
from storage.state import changes, entries, file_images, file_rows, indexes, instances, places, rows
from storage.state.kv import Kv, Transaction
from storage.state.model import Leaving

# What both nodes have alike, if they have the same log; `log` and most of `meta` are made anew.
SHARED: Final = (
    "entries",
    "kept",
    "instances",
    "tombstone",
    "series",
    "study",
    "number",
    "base",
    "tally",
    "members",
    "patient",
    "series_study",
    "conflict",
    "task",
)
# Of these a node of the first versions wants the rows. They say nothing that the rows of the others don't: whoever has
# the state needs none of them, as both nodes have what they say, and counts them as forgotten.
NOT_TAKEN: Final = ("entries",)
# Tables that nodes of the first version to give its state don't know.
LATER: Final = ("blocks", *file_rows.TABLES, *file_images.TABLES, *indexes.TABLES)
FORMAT: Final = 4  # of the rows of all these
ROWS_AT_ONCE: Final = 4000
BYTES_AT_ONCE: Final = 512 << 10
OWN_ROWS_AT_ONCE: Final = 5000
GONE: Final = "deleted or replaced while this node was away"

Row = tuple[bytes, bytes]


class StateUnusable(Exception):
    """What was given isn't what was asked for."""


class Head(msgspec.Struct, frozen=True, array_like=True):
    """What a snapshot is: up to which entry everything is applied in it, and the epochs of the log up to there."""

    format: int
    lineage: str
    epochs: tuple[tuple[int, int], ...]
    bytes: int  # of all files
    rows: dict[str, int]  # how many each table has
    forgotten: int = 0  # up to which entry what is over was forgotten by who gives it
    size: int = 0  # bytes that it takes on the disk
    more: dict[str, int] = {}  # how many rows the tables have that not every version knows
    index_rules: str = ""  # by which the indexes were made

    @property
    def applied(self) -> int:
        return self.epochs[-1][1] if self.epochs else 0

    @property
    def tables(self) -> dict[str, int]:
        """Those that are taken, with how many rows each has."""
        taken = {*SHARED, *LATER} - set(NOT_TAKEN)
        return {table: count for table, count in (self.rows | self.more).items() if table in taken}


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """The rows of a table from `start` on. Up to `last` who asks has some with this digest; "" if it has none there."""

    table: str
    start: bytes
    last: bytes
    digest: bytes


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """`same`: up to `Ask.last` there are the rows that were named. `ends`: there are no more behind these."""

    same: bool
    rows: list[Row]
    ends: bool


_head = msgspec.msgpack.Decoder(Head)
_ask = msgspec.msgpack.Decoder(Ask | None)
_answer = msgspec.msgpack.Decoder(Answer)
encode = msgspec.msgpack.Encoder().encode
decode_ask = _ask.decode  # None: for the head


def decode_head(raw: bytes) -> Head:
    """Raises StateUnusable."""
    try:
        return _head.decode(raw)
    except msgspec.DecodeError as error:
        raise StateUnusable(str(error)) from error


def decode_answer(raw: bytes) -> Answer:
    """Raises StateUnusable."""
    try:
        return _answer.decode(raw)
    except msgspec.DecodeError as error:
        raise StateUnusable(str(error)) from error


def digest_of(rows: Iterable[Row]) -> bytes:
    found = xxhash.xxh3_128()
    for key, value in rows:
        found.update(len(key).to_bytes(4, "big") + len(value).to_bytes(4, "big"))
        found.update(key)
        found.update(value)
    return found.digest()


# -- giving ------------------------------------------------------------------------------------------------------------


def head(txn: Transaction, on_disk: int) -> Head:
    """Of the state in this snapshot, which takes `on_disk` bytes there."""
    epochs = Epochs(entries.epochs_of(txn).pairs)
    epochs.truncate(int(changes.meta(txn, "applied", 0)))
    stored = int(changes.meta(txn, "bytes", 0))
    lineage, rows = str(changes.meta(txn, "lineage", "")), counts(txn, epochs.last[1])
    forgotten = int(changes.meta(txn, "forgotten", 0))
    more = {table: txn.count(table) for table in LATER}
    rules = str(changes.meta(txn, "index_rules", ""))
    return Head(FORMAT, lineage, tuple(epochs.pairs), stored, rows, forgotten, on_disk, more, rules)


def counts(txn: Transaction, applied: int) -> dict[str, int]:
    """How many rows of the state each table has."""
    found = {table: txn.count(table) for table in SHARED}
    return found | {"entries": sum(1 for _ in _applied(txn, "entries", b"", applied))}


def answer(txn: Transaction, asked: Ask, applied: int) -> Answer:
    """Raises StateUnusable for a table that isn't given."""
    if asked.table not in (*SHARED, *LATER):
        raise StateUnusable(f"table {asked.table!r} isn't given")
    rows, ends = _page(_applied(txn, asked.table, asked.start, applied))
    upto = [row for row in rows if row[0] <= asked.last]
    covered = ends or len(upto) < len(rows) or bool(rows and rows[-1][0] == asked.last)  # all up to it are there
    if asked.last and covered and digest_of(upto) == asked.digest:
        return Answer(True, [], ends and len(upto) == len(rows))
    return Answer(False, rows, ends)


def _applied(txn: Transaction, table: str, start: bytes, applied: int) -> Iterator[Row]:
    """Entries that aren't applied are none of the state's."""
    rows = txn.scan(table, start)
    if table != "entries":
        return rows
    end = entries.seq_key(applied + 1)
    return (row for row in rows if row[0] < end)


def _page(rows: Iterator[Row]) -> tuple[list[Row], bool]:
    """Some rows, and whether they are the last."""
    found: list[Row] = []
    size = 0
    for row in rows:
        if len(found) >= ROWS_AT_ONCE or size >= BYTES_AT_ONCE:
            return found, False
        found.append(row)
        size += len(row[0]) + len(row[1])
    return found, True


# -- taking ------------------------------------------------------------------------------------------------------------


def ask_for(own: Transaction, table: str, start: bytes) -> tuple[Ask, list[Row]]:
    """What to ask next, and the rows that are there already if the answer is that they are the same."""
    rows = _page(own.scan(table, start))[0]
    return Ask(table, start, rows[-1][0] if rows else b"", digest_of(rows) if rows else b""), rows


def add(txn: Transaction, table: str, rows: Iterable[Row]) -> None:
    for key, value in rows:
        txn.append(table, key, value)


def check_counts(txn: Transaction, head: Head) -> None:
    """Raises StateUnusable if not all rows of a state are there."""
    found = counts(txn, head.applied) | {table: txn.count(table) for table in LATER}
    if any(found[table] != count for table, count in head.tables.items()):
        raise StateUnusable(f"rows are missing: {found} instead of {head.tables}")


def complete(old: Kv, new: Kv, head: Head) -> None:
    """Add to a state that was taken what this node knows of its own copies and of itself; all that it has applied is of
    the log that the state is of. Blocks; raises StateUnusable."""
    applied = head.applied
    with new.read() as txn:
        check_counts(txn, head)
    if head.index_rules != indexes.RULES:  # another version gave it
        rows.index_anew(new)
    with old.read() as before:
        for batch in _batches(_own_rows(before, _scanned(new, "kept"))):
            new.update(partial(_put_all, batch))
        facts: dict[str, Any] = {key.decode(): msgspec.msgpack.decode(value) for key, value in before.scan("meta")}
    facts |= {"epochs": head.epochs, "applied": applied, "checkpoint": applied, "bytes": head.bytes}
    facts |= {"forgotten": applied, "index_rules": indexes.RULES}
    if head.lineage:
        facts["lineage"] = head.lineage

    def finish(txn: Transaction) -> None:
        places.count_anew(txn)
        entries.note_end(txn, Epochs(head.epochs))
        changes.put_meta(txn, facts)

    new.update(finish)


def _own_rows(before: Transaction, kept: Iterable[Row]) -> Iterator[tuple[str, bytes, bytes]]:
    """(table, key, row): where copies lie, which are missing, and which files have to go."""
    for key, value in before.scan("words"):
        yield "words", key, value
    located = before.scan("location")
    here = next(located, None)
    for seq, instance in kept:
        while here is not None and here[0] < seq:
            yield _leaving(before, *here)
            here = next(located, None)
        if here is not None and here[0] == seq:
            same = before.get("kept", seq) == instance
            yield ("location", *here) if same else _leaving(before, *here)
            here = next(located, None)
            if same:
                continue
        yield "missing", seq, before.get("missing", seq) or changes.NOT_HERE_YET
    while here is not None:
        yield _leaving(before, *here)
        here = next(located, None)
    for key, value in before.scan("leaving"):
        yield "leaving", key, value


def _scanned(kv: Kv, table: str) -> Iterator[Row]:
    """A table into which others may be written meanwhile: nobody reads then."""
    start = b""
    while True:
        with kv.read() as txn:
            rows = list(islice(txn.scan(table, start), OWN_ROWS_AT_ONCE))
        yield from rows
        if len(rows) < OWN_ROWS_AT_ONCE:
            return
        start = rows[-1][0] + b"\0"


def _leaving(txn: Transaction, seq: bytes, raw: bytes) -> tuple[str, bytes, bytes]:
    location = places.decode(txn, seq, raw)
    kept = txn.get("kept", seq)
    leaving = Leaving(location, instances.uid_of(kept) if kept is not None else "", GONE, keep=True)
    return "leaving", f"{location.volume}/{location.spool}".encode(), encode(leaving)


def _put_all(rows: list[tuple[str, bytes, bytes]], txn: Transaction) -> None:
    for table, key, value in rows:
        if table == "location":
            places.copy(txn, key, value)
        else:
            txn.append(table, key, value)


def _batches(rows: Iterator[tuple[str, bytes, bytes]]) -> Iterator[list[tuple[str, bytes, bytes]]]:
    while batch := list(islice(rows, OWN_ROWS_AT_ONCE)):
        yield batch
