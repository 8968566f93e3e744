"""Copies that are moved from disk to disk while files are open, with disks that can't be read, hang or have no room:
the share of one node and the other node's copies, without the network between them."""

import asyncio
import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from storage.files.keeper import Keeper
from storage.files.local import LocalFile, LocalFiles, copies_in, name_of
from storage.files.mirroring import PeerCannot
from storage.files.namespace import Namespace
from storage.files.peer import Answer, Fetch, Fetched, Op, Pair, PeerLost, PeerState
from storage.files.share import Share
from storage.objects.volume import MARKER
from storage.state import file_rows
from storage.state.file_model import ROOT, Change
from storage.state.files import apply
from storage.workers import Workers
from tests.simulation.machine import MemoryKv

MB = 1 << 20
HANG_S = 1.0


class Proposed:
    def __init__(self, seq: int) -> None:
        self.seq = seq

    async def committed(self) -> None:
        await asyncio.sleep(0)


class Log:
    """What is proposed is committed and in the rows at once."""

    def __init__(self) -> None:
        self.kv, self._count = MemoryKv(), 0

    def propose(self, change: Change) -> Proposed:
        self._count += 1

        def applied(txn: Any) -> None:
            apply(txn, change)
            txn.put("meta", b"applied", msgspec.msgpack.encode(self._count))

        self.kv.update(applied)
        return Proposed(self._count)


class Other:
    """The other node: its keeper, asked over a line that takes a while."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper, self.delay_s = keeper, 0.0
        self.state = PeerState(1, required=True)

    def tell(self, session: int, op: Op) -> None:
        if session == self.state.session:
            self.keeper.take(op, lambda answer: None)

    async def room(self) -> None:
        await asyncio.sleep(self.delay_s / 10)

    async def ask(self, session: int, op: Op) -> Answer:
        if session != self.state.session:
            raise PeerLost
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.keeper.take(op, answer.set_result)
        found = await answer
        await asyncio.sleep(self.delay_s)
        return found

    async def changed(self, before: PeerState) -> None:
        while self.state == before:
            await asyncio.sleep(0.01)


class Nodes:
    """`a` is written to; both have two volumes."""

    def __init__(self, folder: Path, *, alone: bool = False) -> None:
        self.volumes = {node: [_volume(folder / f"{node}{number}") for number in (1, 2)] for node in "ab"}
        self.draining: dict[str, list[Path]] = {"a": [], "b": []}
        self.reserve_bytes = 0
        self.disk = Workers(8, "test")
        self.local = LocalFiles(self.volumes["a"], 0)
        keeper = Keeper(self._of_b, self.disk, HANG_S, lambda: (list(self.draining["b"]), self.reserve_bytes))
        self.other = Other(keeper)
        log = Log()
        self.share = Share(
            Namespace(log.kv, log.propose),
            self.local,
            self.disk,
            time.time_ns,
            hang_s=HANG_S,
            pair=Pair("a", "" if alone else "b"),
            peer=None if alone else self.other,
        )

    def _of_b(self) -> LocalFiles:
        return LocalFiles(self.volumes["b"], self.reserve_bytes, self.draining["b"])

    async def made(self, data: bytes, *, closed: bool = True) -> int:
        """A file whose copies lie on the first volumes, which are to be emptied then."""
        self.local.use(self.volumes["a"], self.volumes["a"][1:], complete=True)
        self.draining["b"] = self.volumes["b"][1:]
        number = self.share.create(ROOT, b"file", stat.S_IFREG | 0o644, 0, 0)
        for at in range(0, len(data), MB):
            await self.share.write(number, at, data[at : at + MB])
        await self.share.flush(number)
        if closed:
            await self.share.release(number)
        self.local.use(self.volumes["a"], self.volumes["a"][:1], complete=True)
        self.draining["b"] = self.volumes["b"][:1]
        return number

    def generation(self, number: int, node: str) -> str:
        return self.share.look(lambda rows: file_rows.generation(rows, number, node))

    def lacking(self, number: int) -> tuple[str, ...]:
        return self.share.look(lambda rows: file_rows.lacking(rows, number))

    def copy(self, number: int, node: str) -> bytes:
        """The bytes that count on a node."""
        name = name_of(self.local.space, number, self.generation(number, node))
        return next((volume / name).read_bytes() for volume in self.volumes[node] if (volume / name).exists())

    def lies_on(self, number: int, node: str) -> Path:
        name = name_of(self.local.space, number, self.generation(number, node))
        return next(volume for volume in self.volumes[node] if (volume / name).exists())


def _volume(path: Path) -> Path:
    path.mkdir()
    (path / MARKER).write_text("{}")
    return path


@pytest.fixture
async def nodes(tmp_path: Path) -> Nodes:
    made = Nodes(tmp_path)
    await made.share.begin()
    return made


def pattern(megabytes: int) -> bytes:
    return b"".join(bytes([65 + number]) * MB for number in range(megabytes))


async def test_both_copies_are_moved(nodes: Nodes) -> None:
    data = pattern(3) + b"end"
    number = await nodes.made(data)
    for node in "ab":
        await nodes.share.move(number, node)
        assert nodes.lies_on(number, node) == nodes.volumes[node][1]
        assert nodes.copy(number, node) == data
    assert nodes.lacking(number) == ()


async def test_a_copy_in_the_making_is_read_by_nobody(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the other node's copy is moved this node's disk has a bad sector: its old copy is the good one."""
    data = pattern(12)
    number = await nodes.made(data)
    nodes.share.open(number)
    assert await nodes.share.read(number, 0, 3) == b"AAA"
    read = LocalFile.read

    def bad_sector(self: LocalFile, size: int, at: int) -> bytes:
        if self._volume.path == nodes.volumes["a"][0] and at <= 7 * MB < at + size:
            raise OSError(errno.EIO, "Input/output error")
        return read(self, size, at)

    monkeypatch.setattr(LocalFile, "read", bad_sector)
    with pytest.raises(OSError, match="Input/output"):
        await nodes.share.move(number, "b")
    assert await nodes.share.read(number, 7 * MB, 4) == data[7 * MB : 7 * MB + 4]
    assert nodes.lacking(number) == ("a",)
    await nodes.share.release(number)
    await nodes.share.heal_own(number)
    await nodes.share.move(number, "b")
    assert nodes.lacking(number) == ()
    assert nodes.copy(number, "a") == nodes.copy(number, "b") == data


async def test_what_is_brought_is_read_from_one_copy(nodes: Nodes) -> None:
    """This node's copy is moved, and written to, while the file is brought to the other node."""
    number = await nodes.made(pattern(20), closed=False)
    nodes.other.state = PeerState(0, required=False)
    for at in range(20):
        await nodes.share.write(number, at * MB, b"while it was away")
    await nodes.share.fsync(number)
    assert nodes.lacking(number) == ("b",)
    nodes.other.keeper.end_session()
    await nodes.other.keeper.at_rest()
    nodes.other.state, nodes.other.delay_s = PeerState(2, required=True), 0.1
    bringing = asyncio.create_task(nodes.share.heal_other(number))
    await asyncio.sleep(0.25)
    await nodes.share.move(number, "a")
    await nodes.share.write(number, 18 * MB, b"NEW" * 100)
    await bringing
    await nodes.share.fsync(number)
    assert nodes.lies_on(number, "a") == nodes.volumes["a"][1]
    assert nodes.copy(number, "a") == nodes.copy(number, "b")
    assert nodes.copy(number, "b")[18 * MB :].startswith(b"NEW" * 100)


async def test_a_thread_that_comes_back_late_writes_to_no_other_file(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = await nodes.made(b"x" * MB)
    held, read = threading.Event(), LocalFile.read

    def hanging(self: LocalFile, size: int, at: int) -> bytes:
        found = read(self, size, at)
        if self._volume.path == nodes.volumes["a"][0]:
            held.wait(60)
        return found

    monkeypatch.setattr(LocalFile, "read", hanging)
    with pytest.raises(OSError, match="doesn't answer"):
        await nodes.share.move(number, "a")
    await asyncio.sleep(0.1)
    others = [nodes.share.create(ROOT, b"%d" % one, stat.S_IFREG | 0o644, 0, 0) for one in range(6)]
    for one in others:
        await nodes.share.write(one, 0, b"y" * 5000)
        await nodes.share.fsync(one)
    held.set()
    await asyncio.sleep(0.5)
    assert {nodes.copy(one, "a") for one in others} == {b"y" * 5000}


@pytest.mark.parametrize("left", [0, 3 * MB])
async def test_without_room_the_old_copy_stays(nodes: Nodes, left: int) -> None:
    number = await nodes.made(pattern(4), closed=False)
    status = os.statvfs(nodes.volumes["b"][1])
    nodes.reserve_bytes = status.f_bavail * status.f_frsize - left
    await nodes.share.move(number, "b")
    assert nodes.lies_on(number, "b") == nodes.volumes["b"][0]
    await nodes.share.write(number, 0, b"more")
    await nodes.share.fsync(number)
    assert nodes.lacking(number) == ()
    assert nodes.copy(number, "b").startswith(b"more")
    nodes.other.keeper.end_session()
    await nodes.other.keeper.at_rest()
    assert list(copies_in(nodes.volumes["b"][1], nodes.local.space)) == []  # nothing of it is left


async def test_the_only_copy_is_left_alone(nodes: Nodes) -> None:
    """This node has lost its own; its program goes on writing to the other one."""
    number = await nodes.made(b"x" * 1000, closed=False)
    await nodes.share.write(number, 0, b"y")
    file = nodes.share._open[number]
    nodes.share._lose(file, OSError(errno.EIO, "lost"))
    with pytest.raises(PeerCannot, match="the only one"):
        await nodes.share.move(number, "b")
    await nodes.share.write(number, 1, b"z")
    await nodes.share.fsync(number)
    assert nodes.lacking(number) == ("a",)
    assert nodes.copy(number, "b").startswith(b"yzx")


async def test_a_file_that_is_cut_while_it_is_moved_is_whole(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    number = await nodes.made(pattern(6), closed=False)
    read, cut = LocalFile.read, threading.Event()

    def slow(self: LocalFile, size: int, at: int) -> bytes:
        if at == 4 * MB:
            cut.wait(60)
        return read(self, size, at)

    monkeypatch.setattr(LocalFile, "read", slow)
    moving = asyncio.create_task(nodes.share.move(number, "a"))
    await asyncio.sleep(0.1)
    cutting = asyncio.create_task(nodes.share.truncate(number, 5 * MB - 17))
    await asyncio.sleep(0.1)
    cut.set()
    await asyncio.gather(moving, cutting)
    await nodes.share.fsync(number)
    assert nodes.lacking(number) == ()
    assert nodes.copy(number, "a") == nodes.copy(number, "b") == pattern(6)[: 5 * MB - 17]


async def test_a_hole_at_the_end_stays_one(nodes: Nodes) -> None:
    """It says that a file was never written to its end."""
    number = await nodes.made(b"x" * 5000, closed=False)
    await nodes.share.truncate(number, 3 * MB)
    await nodes.share.flush(number)
    assert await nodes.share.ends_unwritten(number)
    await nodes.share.move(number, "a")
    assert await nodes.share.ends_unwritten(number)
    assert len(nodes.copy(number, "a")) == 3 * MB


async def test_a_copy_that_was_removed_in_the_making_never_counts(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = await nodes.made(b"x" * 5000)
    sync: Callable[[LocalFile], None] = LocalFile.sync

    def removed(self: LocalFile) -> None:
        if self._volume.path == nodes.volumes["a"][1]:
            for one, generation in copies_in(nodes.volumes["a"][1], nodes.local.space):
                os.unlink(nodes.volumes["a"][1] / name_of(nodes.local.space, one, generation))
        sync(self)

    monkeypatch.setattr(LocalFile, "sync", removed)
    with pytest.raises(OSError, match="removed"):
        await nodes.share.move(number, "a")
    assert nodes.copy(number, "a") == b"x" * 5000


async def test_copies_that_differ_stay_what_they_are(nodes: Nodes) -> None:
    """Nobody can say here which of the two is the good one; it is logged."""
    number = await nodes.made(b"good" * 1000)
    rotten = nodes.volumes["b"][0] / name_of(nodes.local.space, number)
    rotten.write_bytes(b"rot!" + rotten.read_bytes()[4:])
    await nodes.share.move(number, "a")
    assert nodes.copy(number, "a") == b"good" * 1000
    fetched = await nodes.other.ask(1, Fetch(nodes.local.space, number, "", 0, 4))
    assert fetched == Fetched(b"rot!")
