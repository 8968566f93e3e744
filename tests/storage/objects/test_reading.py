"""Long objects are checked as they are read, and read on from a good copy where a block isn't good."""

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash

from storage.objects.blocks import BlockDigests
from storage.objects.copies import Copies
from storage.objects.local_volume import LocalVolume, create_marker
from storage.objects.reading import WHOLE_BYTES, Reading, Unavailable
from storage.objects.volumes import Volumes
from storage.replication.pending import Pendings
from storage.state.catalogue import Batch, Catalogue
from storage.state.model import Entry, Instance, Location, Put
from storage.workers import Workers
from tests.conftest import wait_for
from tests.simulation.machine import MemoryKv

HEADER = b"header"
DATA = random.Random(3).randbytes(2 * WHOLE_BYTES + (1 << 20) + 12345)


@dataclass
class Archive:
    """One object, and what is done when it is to be made again."""

    reading: Reading
    instance: Instance
    file: Path
    catalogue: Catalogue
    remade: list[int]
    remake: Callable[[], None]
    opened: int = 0

    async def read(self, *, whole: bool = False) -> bytes:
        source = await self.reading.open(self.instance, whole=whole)
        return b"".join([bytes(block) async for block in source.blocks()])

    def spoil(self, at: int) -> None:
        raw = bytearray(self.file.read_bytes())
        raw[len(HEADER) + at] ^= 1
        self.file.write_bytes(raw)

    def mend(self) -> None:
        self.file.write_bytes(HEADER + DATA)


@pytest.fixture
def archive(tmp_path: Path, request: pytest.FixtureRequest) -> Archive:
    volume_id = create_marker(tmp_path / "disk")
    volumes, workers, catalogue = Volumes([tmp_path / "disk"], 0), Workers(2, "test"), Catalogue(MemoryKv())
    request.addfinalizer(workers.stop)
    request.addfinalizer(volumes.close)
    blocks = BlockDigests()
    blocks.update(DATA)
    digest, length = xxhash.xxh3_128_digest(DATA), len(HEADER) + len(DATA)
    put = Put("1.2", "1.3", "1.4", "1.5", "1.2.1", digest, length, len(HEADER), {}, "CT", 1.0, blocks=blocks.digests())
    entry, location = Entry(1, 1, put), Location(volume_id, "spooled", "")
    catalogue.write(Batch(appends=[(entry, location)], applies=[(entry, location)]))
    file = tmp_path / "disk" / "spool" / "spooled"
    copies = Copies(catalogue, volumes, workers, Pendings(), lambda _: False)
    instance = catalogue.instance("1.2")
    assert instance

    async def remake(seq: int) -> None:
        made.remade.append(seq)
        made.remake()

    made = Archive(Reading(copies, remake, workers, 30.0), instance, file, catalogue, [], lambda: None)
    made.remake = made.mend
    made.mend()
    return made


def test_a_good_one_is_read_as_it_is(archive: Archive) -> None:
    assert asyncio.run(archive.read()) == asyncio.run(archive.read(whole=True)) == DATA
    assert archive.remade == []


@pytest.mark.parametrize("at", [0, WHOLE_BYTES - 1, WHOLE_BYTES, len(DATA) - 1])
def test_it_goes_on_where_a_block_is_bad(archive: Archive, at: int) -> None:
    archive.spoil(at)
    assert asyncio.run(archive.read()) == DATA
    assert archive.remade == [1]


def test_nothing_bad_is_given_out_if_there_is_no_other_copy(archive: Archive) -> None:
    archive.remake = lambda: None
    archive.spoil(WHOLE_BYTES + 5)
    found = b""

    async def read() -> None:
        nonlocal found
        source = await archive.reading.open(archive.instance)
        async for block in source.blocks():
            found += bytes(block)

    with pytest.raises(Unavailable):
        asyncio.run(read())
    assert found == DATA[: len(found)]
    assert len(found) <= WHOLE_BYTES


@pytest.mark.parametrize("blocks", [b"", bytes(16), bytes(160)])
def test_digests_of_blocks_that_are_wrong_hide_no_good_copy(archive: Archive, blocks: bytes) -> None:
    """b"": of a version that made none."""
    archive.catalogue.kv.update(lambda txn: txn.put("blocks", (1).to_bytes(8, "big"), blocks))
    assert asyncio.run(archive.read()) == DATA
    assert archive.remade == ([1] if blocks else [])


def test_the_catalogue_keeps_them_with_the_entry(archive: Archive) -> None:
    operation = archive.catalogue.entry(1).operation
    assert isinstance(operation, Put)
    assert msgspec.structs.replace(operation, blocks=b"") == archive.instance.put
    assert len(operation.blocks) == 10 * 16


@pytest.mark.parametrize("hung", [False, True])
def test_whoever_stops_in_the_middle_leaves_no_file_open(
    archive: Archive, hung: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next part is being read just then, and its disk doesn't answer, perhaps."""
    answers, reading, read = threading.Event(), threading.Event(), LocalVolume.open

    def opened(volume: LocalVolume, name: str, offset: int = 0) -> Any:
        file = read(volume, name, offset)

        def read_slowly(size: int, read: Callable[[int], bytes] = file.read) -> bytes:
            found = read(size)
            if count.count(None) == 1:  # the second part
                reading.set()
                assert answers.wait(60)
            count.append(None)
            return found

        count: list[None] = []
        if hung:
            monkeypatch.setattr(file, "read", read_slowly, raising=False)
        return file

    monkeypatch.setattr(LocalVolume, "open", opened)

    async def begin() -> None:
        parts = (await archive.reading.open(archive.instance)).blocks()
        assert bytes(await anext(parts)) == DATA[:WHOLE_BYTES]
        if hung:
            await asyncio.to_thread(reading.wait, 60)
        await parts.aclose()
        answers.set()

    asyncio.run(begin())
    wait_for(lambda: archive.file not in open_files(), "the file to be closed")


def open_files() -> set[Path]:
    found = set()
    for one in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(one.readlink())
    return found
