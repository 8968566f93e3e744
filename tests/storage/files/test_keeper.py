"""The standby's copies: what is told is carried out in its order, what fails is said at the next sync."""

import asyncio
import threading
from pathlib import Path

import pytest

from storage.files.copies import CopyStore, StoredFile
from storage.files.keeper import Keeper
from storage.files.local import LocalFiles, name_of
from storage.files.peer import (
    Answer,
    Begin,
    Blocks,
    Compare,
    Create,
    Cut,
    End,
    Failed,
    Fetch,
    Fetched,
    Op,
    Renew,
    Renewed,
    Sync,
    Synced,
    Write,
)
from storage.objects.volume import MARKER
from storage.workers import Workers

SPACE = "0123abcd"
HANG_S = 0.5


class Standby:
    def __init__(self, folder: Path) -> None:
        self.volume = folder / "volume"
        self.volume.mkdir()
        (self.volume / MARKER).write_text("marker")
        self.disk = Workers(4, "test")
        self.volumes, self.draining = [self.volume], list[Path]()
        self.keeper = Keeper(self.open_store, self.disk, HANG_S, lambda: (list(self.volumes), list(self.draining)))
        self.held = threading.Event()
        self.hangs = False

    def open_store(self) -> CopyStore:
        store = LocalFiles(self.volumes, 0, self.draining)
        return Hanging(self, store) if self.hangs else store

    async def ask(self, op: Op) -> Answer:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.keeper.take(op, answer.set_result)
        async with asyncio.timeout(30):
            return await answer

    def bytes_of(self, number: int, copy: str = "") -> bytes:
        return (self.volume / name_of(SPACE, number, copy)).read_bytes()


class Hanging:
    """A store on a disk that doesn't answer writes until it is let go."""

    complete = True

    def __init__(self, standby: Standby, store: LocalFiles) -> None:
        self._standby, self._store = standby, store
        self.space = SPACE

    def create(self, number: int, generation: str) -> StoredFile:
        self._store.space = self.space
        made = self._store.create(number, generation)
        write = made.write

        def held(data: bytes, at: int, grows: int) -> None:
            self._standby.held.wait(60)
            write(data, at, grows)

        made.write = held  # type: ignore[method-assign]
        return made

    def close(self) -> None:
        self._store.close()


@pytest.fixture
def standby(tmp_path: Path) -> Standby:
    return Standby(tmp_path)


async def test_what_is_told_is_carried_out_in_its_order(standby: Standby) -> None:
    for op in (Create(SPACE, 7), Write(7, 0, b"aaaa"), Cut(7, 2), Write(7, 4, b"bb"), Write(7, 5, b"c")):
        standby.keeper.take(op, lambda answer: None)
    assert await standby.ask(Sync(7)) == Synced()
    assert standby.bytes_of(7) == b"aa\0\0bc"
    assert await standby.ask(Fetch(SPACE, 7, "", 4, 100)) == Fetched(b"bc")
    await standby.keeper.stop()


async def test_a_file_is_begun_before_it_is_written_to(standby: Standby) -> None:
    assert isinstance(await standby.ask(Write(7, 0, b"a")), Failed)
    assert isinstance(await standby.ask(Sync(7)), Failed)
    await standby.ask(Create(SPACE, 7))
    await standby.ask(Write(7, 0, b"abc"))
    await standby.ask(End(7))
    assert isinstance(await standby.ask(Sync(7)), Failed)
    assert isinstance(await standby.ask(Begin(SPACE, 7, "", 2)), Failed), "it isn't as long as that"
    assert isinstance(await standby.ask(Sync(7)), Failed)
    assert await standby.ask(Begin(SPACE, 7, "", 3)) == Renewed("")
    assert await standby.ask(Sync(7)) == Synced()
    await standby.keeper.stop()


async def test_a_copy_is_compared_and_renewed(standby: Standby) -> None:
    absent = await standby.ask(Compare(SPACE, 7, "", 0))
    assert isinstance(absent, Failed)
    assert await standby.ask(Renew(SPACE, 7, "", "5b1d0e77", 3)) == Renewed("")
    await standby.ask(Write(7, 0, b"abcdef"))
    assert await standby.ask(Renew(SPACE, 7, "", "5b1d0e77", 3)) == Renewed("")
    found = await standby.ask(Compare(SPACE, 7, "", 0))
    assert isinstance(found, Blocks)
    assert (found.size, len(found.digests)) == (3, 1)
    assert standby.bytes_of(7) == b"abc"
    await standby.keeper.stop()


async def test_a_copy_leaves_its_volume_when_it_is_begun_anew(standby: Standby) -> None:
    other = standby.volume.with_name("other")
    other.mkdir()
    (other / MARKER).write_text("marker")
    await standby.ask(Create(SPACE, 7))
    await standby.ask(Write(7, 0, b"abc"))
    assert await standby.ask(Sync(7)) == Synced()
    standby.volumes, standby.draining = [standby.volume, other], [standby.volume]
    assert await standby.ask(Begin(SPACE, 7, "", 3)) == Renewed("")  # the same copy, as was said
    assert await standby.ask(Renew(SPACE, 7, "", "5b1d0e77", 3)) == Renewed("5b1d0e77")
    await standby.ask(Write(7, 0, b"abd"))
    assert await standby.ask(Sync(7)) == Synced()
    assert (other / name_of(SPACE, 7, "5b1d0e77")).read_bytes() == b"abd"
    assert standby.bytes_of(7) == b"abc"  # until the rows name the other
    assert await standby.ask(Renew(SPACE, 7, "5b1d0e77", "6b1d0e77", 3)) == Renewed("5b1d0e77")
    await standby.keeper.stop()


async def test_a_disk_that_hangs_holds_up_nothing_and_writes_nothing_late(standby: Standby) -> None:
    """The thread comes back when a newer copy has long been made: that isn't touched."""
    standby.hangs = True
    await standby.ask(Create(SPACE, 7))
    late = standby.ask(Write(7, 0, b"late"))
    assert isinstance(await late, Failed)
    assert isinstance(await standby.ask(Sync(7)), Failed)
    standby.hangs = False
    assert await standby.ask(Renew(SPACE, 7, "", "5b1d0e77", 0)) == Renewed("5b1d0e77")
    await standby.ask(Write(7, 0, b"new"))
    assert await standby.ask(Sync(7)) == Synced()
    standby.held.set()
    await standby.keeper.stop()
    standby.disk.stop()
    assert standby.bytes_of(7, "5b1d0e77") == b"new"
