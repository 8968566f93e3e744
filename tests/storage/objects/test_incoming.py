"""Objects on their way to the disk: written in pieces or at once, and written again when their disk fails."""

import asyncio
import errno
import threading
from pathlib import Path

import pytest
import xxhash

from storage.objects.blob_store import Spooled
from storage.objects.blocks import BLOCK_BYTES, BlockDigests
from storage.objects.incoming import WRITE_BYTES, Incoming
from storage.objects.local_files import LocalSpooled
from storage.objects.local_volume import LocalVolume, create_marker
from storage.objects.volume import NoRoom
from storage.objects.volumes import Volumes
from storage.workers import Workers

HEADER = b"header"


class UnsyncedSpooled(LocalSpooled):
    def finish(self, digest: bytes = b"", *, sync: bool = True) -> None:
        super().finish(digest, sync=sync)
        raise OSError(errno.EIO, "Input/output error")


class FailingVolume(LocalVolume):
    """Takes the bytes and fails at the sync."""

    def create(self) -> Spooled:
        return UnsyncedSpooled(self.path / "spool" / f"failing-{self.id[:8]}")


def volumes(tmp_path: Path, *, failing: int, count: int = 2) -> Volumes:
    for number in range(count):
        create_marker(tmp_path / f"disk{number}")
    made = Volumes([tmp_path / f"disk{number}" for number in range(count)], 0)
    for slot in made.slots[:failing]:
        assert slot.volume
        slot.volume.close()
        slot.volume = made._by_id[slot.volume.id].volume = FailingVolume(slot.path)
    return made


def incoming(made: Volumes, workers: Workers, size: int) -> tuple[Incoming, bytes]:
    first = made.slots[0].volume
    assert first
    data = bytes(range(256)) * (size // 256)
    coming = Incoming(workers, made, first, HEADER)
    coming.feed(memoryview(data))
    return coming, data


async def finished(made: Volumes, size: int) -> tuple[Incoming, bytes, bytes]:
    workers = Workers(1, "test")
    try:
        coming, data = incoming(made, workers, size)
        return coming, data, await coming.finish()
    finally:
        workers.stop()


@pytest.mark.parametrize("size", [256, 100 << 10, 3 * WRITE_BYTES])
def test_whole_object_is_written_and_digested(tmp_path: Path, size: int) -> None:
    coming, data, digest = asyncio.run(finished(volumes(tmp_path, failing=0), size))
    assert digest == xxhash.xxh3_128_digest(data)
    assert (coming.volume.path / "spool" / coming.spool).read_bytes() == HEADER + data


def test_object_in_memory_goes_to_another_volume_when_the_sync_fails(tmp_path: Path) -> None:
    made = volumes(tmp_path, failing=1)
    coming, data, digest = asyncio.run(finished(made, 100 << 10))
    assert digest == xxhash.xxh3_128_digest(data)
    assert coming.volume.path == tmp_path / "disk1"
    assert (coming.volume.path / "spool" / coming.spool).read_bytes() == HEADER + data
    assert made.slots[0].failed
    assert list((tmp_path / "disk0" / "spool").iterdir()) == []


def test_long_object_fails_with_its_disk(tmp_path: Path) -> None:
    made = volumes(tmp_path, failing=1)
    with pytest.raises(OSError, match="Input/output"):
        asyncio.run(finished(made, 3 * WRITE_BYTES))
    assert made.slots[0].failed


def test_no_volume_left(tmp_path: Path) -> None:
    with pytest.raises(NoRoom):
        asyncio.run(finished(volumes(tmp_path, failing=2), 256))


def test_a_disk_that_lets_nobody_in_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its spool folder belongs to somebody else, say: it isn't taken for broken at once, and the other one is tried."""
    made = volumes(tmp_path, failing=0)
    create = LocalVolume.create

    def refused(self: LocalVolume) -> Spooled:
        if self.path == tmp_path / "disk0":
            raise PermissionError(errno.EACCES, "Permission denied")
        return create(self)

    monkeypatch.setattr(LocalVolume, "create", refused)
    coming, data, digest = asyncio.run(finished(made, 256))
    assert digest == xxhash.xxh3_128_digest(data)
    assert coming.volume.path == tmp_path / "disk1"
    assert not made.slots[0].failed


def test_digest_at_once_is_that_of_the_bytes(tmp_path: Path) -> None:
    async def digests() -> tuple[bytes | None, bytes, bytes]:
        workers = Workers(1, "test")
        coming, data = incoming(volumes(tmp_path, failing=0), workers, 1 << 10)
        early = coming.digest_at_once()
        late = await coming.finish()
        workers.stop()
        return early, late, xxhash.xxh3_128_digest(data)

    early, late, expected = asyncio.run(digests())
    assert early == late == expected


def test_time_counts_from_when_a_thread_comes_to_it(tmp_path: Path) -> None:
    """What waits for threads that another disk holds says nothing of its own disk."""
    let_go = threading.Event()

    async def measured() -> tuple[float, float, bytes]:
        workers = Workers(1, "test")
        workers.run(let_go.wait)
        coming, data = incoming(volumes(tmp_path, failing=0), workers, 256)
        finishing = coming.begin_finish()
        await asyncio.sleep(0.05)
        waited = coming.stuck_for(asyncio.get_running_loop().time() + 60)
        assert coming.waits
        let_go.set()
        await finishing
        workers.stop()
        return waited, coming.stuck_for(asyncio.get_running_loop().time() + 60), data

    waited, after, _ = asyncio.run(measured())
    assert waited == after == 0.0


def test_an_earlier_attempt_does_nothing_more(tmp_path: Path) -> None:
    """The object went on without it: to another disk, perhaps with half of it written there."""

    async def restarted() -> tuple[Incoming, bytes]:
        workers = Workers(1, "test")
        coming, data = incoming(volumes(tmp_path, failing=0), workers, 256)
        coming.complete()
        early = coming.attempt
        late = coming.restart()
        with pytest.raises(BlockingIOError):
            coming.land_here(early)
        coming.land_here(late)
        workers.stop()
        return coming, data

    coming, data = asyncio.run(restarted())
    assert coming.digest == xxhash.xxh3_128_digest(data)
    assert (coming.volume.path / "spool" / coming.spool).read_bytes() == HEADER + data


def test_what_waits_goes_where_a_disk_serves(tmp_path: Path) -> None:
    made = volumes(tmp_path, failing=0)

    async def moved() -> Incoming:
        workers = Workers(1, "test")
        coming, _ = incoming(made, workers, 256)
        made.hangs(coming.volume.id)
        await coming.finish()
        workers.stop()
        return coming

    assert asyncio.run(moved()).volume.path == tmp_path / "disk1"


def test_the_second_discard_returns_at_once(tmp_path: Path) -> None:
    let_go = threading.Event()

    async def twice() -> list[Path]:
        workers = Workers(1, "test")
        workers.run(let_go.wait)
        coming, _ = incoming(volumes(tmp_path, failing=0), workers, 256)
        coming.begin_finish()
        first = asyncio.ensure_future(coming.discard())
        await asyncio.sleep(0)
        await coming.discard()
        assert not first.done()
        let_go.set()
        await first
        workers.stop()
        return list((coming.volume.path / "spool").iterdir())

    assert asyncio.run(twice()) == []


@pytest.mark.parametrize("size", [100 << 10, 3 * WRITE_BYTES])
@pytest.mark.parametrize("finish_first", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_nothing_is_written_before_it_is_known_where_to(
    tmp_path: Path, size: int, finish_first: bool, known: bool
) -> None:
    made = volumes(tmp_path, failing=0)

    async def run() -> tuple[Incoming, bytes]:
        workers = Workers(1, "test")
        try:
            coming = Incoming(workers, made, made.slots[0].volume, HEADER)
            coming.hold()
            coming.feed(memoryview(bytes(size)))
            ending = coming.begin_finish() if finish_first else None
            await asyncio.sleep(0.05)
            assert not coming.placed
            assert all(not slot.volume.spooled() for slot in made.slots)
            coming.go_to(made.slots[1].volume if known else None)
            coming.go_to(made.slots[0].volume)  # too late
            digest = await (ending or coming.begin_finish())
        finally:
            workers.stop()
        return coming, digest

    coming, digest = asyncio.run(run())
    assert digest == xxhash.xxh3_128_digest(bytes(size))
    assert coming.volume is made.slots[known].volume
    assert (coming.volume.path / "spool" / coming.spool).read_bytes() == HEADER + bytes(size)


@pytest.mark.parametrize("size", [BLOCK_BYTES, BLOCK_BYTES + 256, 5 * BLOCK_BYTES + 256])
@pytest.mark.parametrize("chunk", [16 << 10, 64 << 10, 256 << 10, 1 << 20, 5 << 20])
@pytest.mark.parametrize("held", [0, 2 << 20])
def test_digests_of_blocks_are_of_the_bytes_alone(tmp_path: Path, size: int, chunk: int, held: int) -> None:
    """However they come, and whatever was waited for meanwhile: both nodes must find the same."""
    made, data = volumes(tmp_path, failing=0), (bytes(range(256)) * (size // 256 + 1))[:size]

    async def run() -> Incoming:
        workers = Workers(1, "test")
        try:
            coming = Incoming(workers, made, made.slots[0].volume, HEADER)
            if held:
                coming.hold()
            for at in range(0, size, chunk):
                if at >= held:
                    coming.go_to(None)
                coming.feed_chunk(bytearray(data[at : at + chunk]))
                await asyncio.sleep(0.001)
            coming.go_to(None)
            await coming.finish()
        finally:
            workers.stop()
        return coming

    coming = asyncio.run(run())
    wanted = BlockDigests()
    wanted.update(data)
    assert coming.blocks == (wanted.digests() if size > BLOCK_BYTES else b"")
