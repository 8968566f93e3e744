"""A state that was taken from the other node is that node's, with what this node knows of its own copies."""

import contextlib
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.state import indexes, transfer
from storage.state.catalogue import Batch, Catalogue
from storage.state.file_model import ROOT, Make, SetXattr
from storage.state.kv import Kv, LmdbKv, SnapshotLost
from storage.state.model import Delete, Entry, Files, Location, Put, Task, TaskDone, Void
from storage.state.transfer import Head, StateUnusable
from tests.conftest import wait_for
from tests.simulation.machine import MemoryKv
from tests.storage.state.test_instances import deletes, puts

tasks = st.builds(Task, st.sampled_from("ab"), st.just("kind"), st.just("AE"), st.just(b""), st.just(1.0))
ends = st.builds(TaskDone, st.sampled_from("ab"), st.just("done"))
long_ones = st.builds(lambda put, blocks: msgspec.structs.replace(put, blocks=blocks), puts, st.binary(max_size=48))
names = st.builds(
    Make, st.sampled_from([ROOT, 16]), st.sampled_from([b"a", b"b"]), st.just(0o040755), *[st.just(0)] * 3
)
changes = st.builds(Files, names | st.builds(SetXattr, st.just(16), st.just(b"user.a"), st.binary(), st.just(1)))
operations = st.lists(puts | puts | long_ones | deletes | tasks | ends | changes, max_size=25)


def applied(catalogue: Catalogue, entries: list[Entry], *, copies: bool) -> None:
    for entry in entries:
        path = f"P/S/{entry.seq}.dcm" if entry.seq % 3 else ""
        place = Location("volume", f"spool-{entry.seq}", path) if copies and isinstance(entry.operation, Put) else None
        catalogue.write(Batch(appends=[(entry, place)], applies=[(entry, place)]))


def taken(
    giver: Catalogue, taker: Catalogue, given: list[int] | None = None, *, by_older: bool = False
) -> tuple[Kv, Head]:
    """As the two nodes do it. `given`: how many rows each answer brings. `by_older`: who gives is of a version that
    doesn't know all tables."""
    snapshot = giver.kv.snapshot()
    head = transfer.decode_head(transfer.encode(snapshot.read(lambda txn: transfer.head(txn, 1))))
    if by_older:
        head = transfer.decode_head(transfer.encode(msgspec.structs.astuple(head)[:-1]))
    new = taker.kv.beside()
    for table in head.tables:
        start, there = b"", False
        while not there:
            with taker.kv.read() as txn:
                asked, own = transfer.ask_for(txn, table, start)
            raw = transfer.encode(asked)
            answer = snapshot.read(lambda txn, raw=raw: transfer.answer(txn, transfer.decode_ask(raw), head.applied))
            answer = transfer.decode_answer(transfer.encode(answer))
            if given is not None:
                given.append(len(answer.rows))
            rows, there = own if answer.same else answer.rows, answer.ends
            new.update(lambda txn, rows=rows, table=table: transfer.add(txn, table, rows))
            assert rows or there
            start = rows[-1][0] + b"\0" if rows else b""
    snapshot.close()
    return new, head


def table(kv: Kv, name: str) -> list[tuple[bytes, bytes]]:
    with kv.read() as txn:
        return list(txn.scan(name))


@given(operations, st.integers(0, 25), st.integers(0, 5), st.integers(1, 5), st.booleans())
@settings(deadline=None)
def test_it_is_the_others_state_and_this_nodes_copies(
    done: list, own: int, tail: int, at_once: int, by_older: bool
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(transfer, "ROWS_AT_ONCE", at_once)
        entries = [Entry(1 + (seq > 9), seq, operation) for seq, operation in enumerate(done, 1)]
        giver, taker = Catalogue(MemoryKv()), Catalogue(MemoryKv())
        upto = max(0, len(entries) - tail)
        applied(giver, entries[:upto], copies=False)
        facts = {"lineage": "it"} | ({} if by_older else {"index_rules": indexes.RULES})
        giver.write(Batch(appends=[(entry, None) for entry in entries[upto:]], meta=facts))
        applied(taker, entries[: min(own, upto)], copies=True)
        taker.write(Batch(meta={"store_id": "mine", "promised": 3}))
        before = dict(taker.locations())
        taker.become(*taken(giver, taker, by_older=by_older), contextlib.nullcontext)
    for name in {*transfer.SHARED, *(() if by_older else transfer.LATER)} - {*transfer.NOT_TAKEN}:
        assert table(taker.kv, name) == table(giver.kv, name)
    # Of entries that are no instances the rows of the other tables are all that is needed.
    assert not table(taker.kv, "entries")
    assert taker.meta("forgotten", 0) == upto
    for mine, theirs in zip(taker.entries(1, 100), giver.entries(1, upto), strict=True):
        assert (mine.epoch, mine.seq) == (theirs.epoch, theirs.seq)
        if not by_older:
            kept = theirs.operation if isinstance(theirs.operation, Put) else Void()
            assert mine.operation == kept
    assert (taker.epochs.last[1], taker.meta("applied", 0), taker.meta("checkpoint", 0)) == (upto, upto, upto)
    assert (taker.meta("store_id", ""), taker.meta("promised", 0), taker.meta("lineage", "")) == ("mine", 3, "it")
    assert taker.meta("bytes", 0) == giver.meta("bytes", 0)
    alive = [int.from_bytes(seq, "big") for seq, _ in table(giver.kv, "kept")]
    assert dict(taker.locations()) == {seq: before[seq] for seq in alive if seq in before}
    assert taker.missing() == [seq for seq in alive if seq not in before]
    gone = {place.spool for seq, place in before.items() if seq not in alive}
    assert gone <= {leaving.location.spool for _, leaving in taker.leavings(1000)}
    assert sum(taker.copies_on().values()) == len(dict(taker.locations()))
    assert taker.locations_on("volume", 0, 100) == list(taker.locations())
    more = Entry(3, upto + 1, done[0] if done else Delete("2.1", "", "", "why", "", 0.0))
    taker.write(Batch(appends=[(more, None)], applies=[(more, None)]))  # and the log goes on


def lmdb_pair(folder: Path, count: int) -> tuple[Catalogue, Catalogue]:
    giver, taker = (Catalogue.open(folder / name / "catalogue", 1 << 20) for name in ("giver", "taker"))
    entries = [
        Entry(
            1,
            seq,
            Put(
                f"1.9.{seq}",
                *("1.4", "1.2", f"1.3.{seq % 7}", "1.5", bytes(16), 100, 60, {}, "CT", 1.0),
                blocks=bytes(32) if seq % 9 == 0 else b"",
            ),
        )
        for seq in range(1, count + 1)
    ]
    giver.write(Batch(appends=[(entry, None) for entry in entries], applies=[(entry, None) for entry in entries]))
    applied(taker, entries[:20], copies=True)
    return giver, taker


def test_it_is_there_after_a_start(tmp_path: Path) -> None:
    giver, taker = lmdb_pair(tmp_path, 9000)
    taker.become(*taken(giver, taker), contextlib.nullcontext)
    assert not (tmp_path / "taker" / "catalogue.taken").exists()
    for _ in range(2):
        assert len(taker.missing()) == 9000 - 20
        assert taker.counts()["instances"] == 9000
        assert taker.instance("1.9.8999") == giver.instance("1.9.8999")
        taker.close()
        taker = Catalogue.open(tmp_path / "taker" / "catalogue", 1 << 20)
    taker.close()
    giver.close()


def test_what_is_the_same_isnt_given(tmp_path: Path) -> None:
    giver, taker = lmdb_pair(tmp_path, 9000)
    given: list[int] = []
    taker.become(*taken(giver, taker, given), contextlib.nullcontext)
    assert sum(given) > 3 * 8900
    given.clear()
    taker.become(*taken(giver, taker, given), contextlib.nullcontext)
    assert sum(given) == 0
    giver.write(Batch(meta={}, applies=[(Entry(1, 9001, Delete("1.2", "1.3.3", "1.9.3", "", "", 0.0)), None)]))
    giver.write(Batch(truncate_after=9000))
    given.clear()
    taken(giver, taker, given)[0].discard()
    assert 0 < sum(given) < 5 * transfer.ROWS_AT_ONCE
    giver.close()
    taker.close()


def test_readers_see_one_state_or_the_other(tmp_path: Path) -> None:
    giver, taker = lmdb_pair(tmp_path, 9000)
    new, head = taken(giver, taker)
    ended = threading.Event()
    seen: list[list[int]] = [[], [], []]

    def read(found: list[int]) -> None:
        while not ended.is_set():
            found.append(taker.counts()["instances"])

    readers = [threading.Thread(target=read, args=[found]) for found in seen]
    for reader in readers:
        reader.start()
    wait_for(lambda: all(seen), "the readers")
    taker.become(new, head, contextlib.nullcontext)
    wait_for(lambda: all(9000 in found for found in seen), "the readers")
    ended.set()
    for reader, found in zip(readers, seen, strict=True):
        reader.join()
        assert found == sorted(found)
        assert set(found) == {20, 9000}
    giver.close()
    taker.close()


@pytest.mark.parametrize("name", ["members", "blocks"])
def test_a_part_that_is_missing_is_noticed(tmp_path: Path, name: str) -> None:
    giver, taker = lmdb_pair(tmp_path, 50)
    new, head = taken(giver, taker)
    new.update(lambda txn: txn.delete(name, next(txn.scan(name))[0]))
    with pytest.raises(StateUnusable, match="rows are missing"):
        taker.become(new, head, contextlib.nullcontext)
    new.discard()
    assert taker.counts()["instances"] == 20
    with pytest.raises(StateUnusable, match="isn't given"):
        giver.kv.snapshot().read(lambda txn: transfer.answer(txn, transfer.Ask("location", b"", b"", b""), 1))
    giver.close()
    taker.close()


def test_a_snapshot_gives_way_to_what_is_written(tmp_path: Path) -> None:
    kv = LmdbKv(tmp_path / "kv", 1 << 20, ("table",))
    kv.update(lambda txn: txn.put("table", b"key", b"old"))
    snapshot = kv.snapshot()
    kv.update(lambda txn: txn.put("table", b"key", b"new"))
    assert snapshot.read(lambda txn: txn.get("table", b"key")) == b"old"
    for number in range(40):
        kv.update(lambda txn, number=number: txn.put("table", b"%d" % number, bytes(100_000)))  # the map grows
    with pytest.raises(SnapshotLost):
        snapshot.read(lambda txn: txn.get("table", b"key"))
    snapshot.close()
    kv.close()
