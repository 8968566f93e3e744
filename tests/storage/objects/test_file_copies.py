"""An instance that lies in a file of the share is read as it was looked at, or not at all, whoever writes to it."""

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import xxhash

from storage.files.local import name_of
from storage.objects.blocks import BlockDigests
from storage.objects.copies import Copies
from storage.objects.file_copies import FileCopies
from storage.objects.local_volume import create_marker
from storage.objects.reading import WHOLE_BYTES, Reading, Unavailable
from storage.objects.volumes import Volumes
from storage.replication.pending import Pendings
from storage.state.catalogue import Batch, Catalogue
from storage.state.file_model import ROOT, BeginWriting, Flush, Lacks, Make, MarkDirty
from storage.state.file_rows import FIRST
from storage.state.files import NUMBERS_SKIPPED
from storage.state.model import Entry, Files, IndexFile, Instance, Operation, Put
from storage.workers import Workers
from tests.simulation.machine import MemoryKv

HEADER = b"header"
LONG = random.Random(3).randbytes(2 * WHOLE_BYTES + 12345)
NUMBER = FIRST + NUMBERS_SKIPPED
SPACE = "3f9a01c2"


@dataclass
class Share:
    catalogue: Catalogue
    reading: Reading
    file: Path
    suspected: list[int]
    seq: int = 0

    def do(self, *operations: Operation) -> None:
        for operation in operations:
            self.seq += 1
            entry = Entry(1, self.seq, operation)
            self.catalogue.write(Batch(appends=[(entry, None)]))
            self.catalogue.write(Batch(applies=[(entry, None)]))

    def flushed(self, data: bytes) -> None:
        """Written in place, and closed."""
        self.file.write_bytes(HEADER + data)
        self.do(Files(Flush(NUMBER, len(HEADER) + len(data), self.seq, self.seq, clean=True, lacking=())))

    def looked_at(self, uid: str, data: bytes) -> Instance:
        blocks = BlockDigests()
        blocks.update(data)
        length, digest = len(HEADER) + len(data), xxhash.xxh3_128_digest(data)
        kept = blocks.digests() if len(data) > 1 << 20 else b""
        put = Put(uid, "1.3", "1.4", "1.5", "1.2.1", digest, length, len(HEADER), {}, "", 1.0, blocks=kept)
        self.do(IndexFile(NUMBER, self.seq, put))
        found = self.catalogue.instance(uid)
        assert found
        return found

    def read(self, instance: Instance, *, whole: bool = False) -> bytes:
        async def read() -> bytes:
            source = await self.reading.open(instance, whole=whole)
            return b"".join([bytes(block) async for block in source.blocks()])

        return asyncio.run(read())


@pytest.fixture
def share(tmp_path: Path, request: pytest.FixtureRequest) -> Share:
    create_marker(tmp_path / "disk")
    volumes, workers, catalogue = Volumes([tmp_path / "disk"], 0), Workers(2, "test"), Catalogue(MemoryKv())
    request.addfinalizer(workers.stop)
    request.addfinalizer(volumes.close)
    file = tmp_path / "disk" / name_of(SPACE, NUMBER)
    file.parent.mkdir(parents=True)
    suspected: list[int] = []

    async def suspect(seq: int) -> None:
        suspected.append(seq)

    copies = Copies(
        catalogue, volumes, workers, Pendings(), lambda _: False, FileCopies(catalogue, volumes, "a").instance
    )
    made = Share(catalogue, Reading(copies, suspect, workers, 30.0), file, suspected)
    made.do(Files(BeginWriting(SPACE)), Files(Make(ROOT, b"1.dcm", 0o100644, 0, 0, 1, dirty=True)))
    return made


@pytest.mark.parametrize("data", [b"short", LONG])
def test_it_is_read_where_it_lies(share: Share, data: bytes) -> None:
    share.flushed(data)
    instance = share.looked_at("1.2.1", data)
    assert share.read(instance) == share.read(instance, whole=True) == data
    share.do(Files(Lacks(NUMBER, "a")))  # a copy that isn't what it should be
    with pytest.raises(Unavailable):
        share.read(instance)


@pytest.mark.parametrize("data", [b"short", LONG])
def test_another_image_in_its_place_isnt_taken_for_it(share: Share, data: bytes) -> None:
    share.flushed(data)
    instance = share.looked_at("1.2.1", data)
    share.do(Files(MarkDirty(NUMBER)))
    share.flushed(data[::-1])
    other = share.looked_at("1.2.2", data[::-1])
    assert share.read(other) == data[::-1]
    for whole in (False, True):
        with pytest.raises(Unavailable):
            share.read(instance, whole=whole)


@pytest.mark.parametrize("known", [True, False])
def test_nothing_mixed_is_given_out(share: Share, known: bool) -> None:
    """It is written to while it is read; `known`: the catalogue knows of it by then."""
    share.flushed(LONG)
    instance = share.looked_at("1.2.1", LONG)
    found = b""

    async def read() -> None:
        nonlocal found
        source = await share.reading.open(instance)
        async for block in source.blocks():
            if not found and known:
                share.do(Files(MarkDirty(NUMBER)))
                share.flushed(LONG[::-1])
                share.looked_at("1.2.2", LONG[::-1])
            share.file.write_bytes(HEADER + LONG[::-1])
            found += bytes(block)

    with pytest.raises(Unavailable):
        asyncio.run(read())
    assert found and found == LONG[: len(found)]
    assert share.suspected == [instance.seq]
