"""What is proposed and what is in the catalogue are seen as one, however far the catalogue is behind."""

import stat
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.files.namespace import Namespace
from storage.files.overlay import Changes, Overlay
from storage.state.file_model import ROOT, Change, Link, Make, Remove, Rename, SetXattr
from storage.state.file_rows import TABLES, FileRefused, listed
from storage.state.files import apply
from tests.simulation.machine import MemoryKv

NAMES = st.sampled_from([b"a", b"b", b"c"])
FOLDERS = st.sampled_from([ROOT, 16, 17, 18, 20])
KINDS = st.sampled_from([stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644])
CHANGES = st.one_of(
    st.builds(Make, FOLDERS, NAMES, KINDS, st.just(0), st.just(0), st.just(1)),
    st.builds(Remove, FOLDERS, NAMES, st.booleans(), st.just(2), st.booleans()),
    st.builds(Rename, FOLDERS, NAMES, FOLDERS, NAMES, st.just(3)),
    st.builds(Link, FOLDERS, FOLDERS, NAMES, st.just(4)),
    st.builds(SetXattr, FOLDERS, st.just(b"user.a"), st.binary(max_size=3), st.just(5)),
)


@dataclass
class Numbered:
    seq: int

    async def committed(self) -> None:
        pass


class Log:
    """Takes every change, and applies them when it is asked to."""

    def __init__(self) -> None:
        self.kv = MemoryKv()
        self.changes: list[Change] = []
        self.applied = 0

    def propose(self, change: Change) -> Numbered:
        self.changes.append(change)
        return Numbered(len(self.changes))

    def apply_up_to(self, seq: int) -> None:
        for number in range(self.applied, seq):
            self.kv.update(lambda txn, number=number: apply(txn, self.changes[number]))
        self.applied = max(self.applied, seq)
        self.kv.update(lambda txn: txn.put("meta", b"applied", msgspec.msgpack.encode(self.applied)))


@given(st.lists(st.tuples(CHANGES, st.integers(0, 6))))
def test_it_looks_as_if_all_was_applied_at_once(steps: list[tuple[Change, int]]) -> None:
    log, reference = Log(), MemoryKv()
    namespace = Namespace(log.kv, log.propose)
    for change, behind in steps:
        try:
            expected = reference.update(lambda txn, change=change: apply(txn, change))
        except FileRefused as refused:
            with pytest.raises(FileRefused) as found:
                namespace.change(change)
            assert found.value.errno == refused.errno
        else:
            assert namespace.change(change)[0] == expected
        log.apply_up_to(len(log.changes) - behind)
        with reference.read() as txn:
            rows = {table: list(txn.scan(table)) for table in TABLES}
        assert namespace.look(lambda seen: {table: list(seen.scan(table)) for table in TABLES}) == rows
    log.apply_up_to(len(log.changes))
    namespace.look(lambda rows: None)
    assert namespace.waiting == 0


def test_a_change_that_cannot_be_proposed_leaves_nothing() -> None:
    log = Log()

    def refuse(change: Change) -> Numbered:
        raise RuntimeError("not the primary")

    namespace = Namespace(log.kv, refuse)
    with pytest.raises(RuntimeError):
        namespace.change(Make(ROOT, b"a", stat.S_IFREG, 0, 0, 1))
    assert namespace.look(lambda rows: list(listed(rows, ROOT))) == []
    assert namespace.waiting == 0


KEYS = st.binary(min_size=1, max_size=2)


@given(st.dictionaries(KEYS, st.binary(max_size=2)), st.dictionaries(KEYS, st.none() | st.binary(max_size=2)), KEYS)
def test_a_scan_is_of_both(below: dict[bytes, bytes], over: dict[bytes, bytes | None], start: bytes) -> None:
    kv, changes = MemoryKv(), Changes()
    for key, value in below.items():
        kv.update(lambda txn, key=key, value=value: txn.put("t", key, value))
    for key, changed in over.items():
        changes.set("t", key, changed)
    merged = {key: value for key, value in {**below, **over}.items() if value is not None and key >= start}
    with kv.read() as txn:
        assert list(Overlay(changes, txn).scan("t", start)) == sorted(merged.items())
