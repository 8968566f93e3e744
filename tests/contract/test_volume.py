"""The contract of a volume, for each kind of it."""

import errno
from collections.abc import Sequence
from pathlib import Path

import pytest

from storage.volume import LocalVolume, Spooled, Volume, VolumeOffline, create_marker


class FullSpooled:
    """Takes some bytes, then says that the disk is full; at the last sync, if not before."""

    def __init__(self, inner: Spooled, room_bytes: int) -> None:
        self._inner, self._room = inner, room_bytes
        self.name = inner.name

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        self._room -= sum(len(buffer) for buffer in buffers)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._inner.write(buffers)

    def finish(self) -> None:
        self._inner.finish()

    def discard(self) -> None:
        self._inner.discard()


class FaultyVolume(LocalVolume):
    """A volume on a disk that has room for one small object."""

    def create(self) -> Spooled:
        return FullSpooled(super().create(), 1000)


@pytest.fixture(params=[LocalVolume, FaultyVolume], ids=["local", "faulty"])
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> Volume:
    create_marker(tmp_path / "disk")
    made: Volume = request.param(tmp_path / "disk")
    return made


def write(volume: Volume, data: bytes = b"data") -> str:
    spooled = volume.create()
    spooled.write([data[:2], data[2:]])
    spooled.finish()
    volume.sync_spool()
    return spooled.name


def test_publish_moves_into_the_tree_and_can_be_repeated(volume: Volume) -> None:
    spool = write(volume)
    for _ in range(2):
        touched = volume.publish(spool, "patient/study/series/1.2.dcm")
        volume.sync_directories(touched)
    path = volume.locate(spool, "patient/study/series/1.2.dcm")
    assert path == volume.path / "archive" / "patient/study/series/1.2.dcm"
    assert path is not None
    assert path.read_bytes() == b"data"
    assert volume.spooled() == []


def test_what_was_never_written_can_not_be_published(volume: Volume) -> None:
    with pytest.raises(FileNotFoundError):
        volume.publish("nothing", "a/b/c/d.dcm")


def test_locate_finds_before_and_after_publication(volume: Volume) -> None:
    spool = write(volume)
    found = volume.locate(spool, "a/b/c/d.dcm")
    assert found is not None
    assert found.parent.name == "spool"
    assert volume.locate("nothing", "") is None


def test_discarded_objects_leave_nothing(volume: Volume) -> None:
    spooled = volume.create()
    spooled.write([b"abc"])
    spooled.discard()
    assert volume.spooled() == []


def test_quarantine_keeps_bytes_and_reason(volume: Volume) -> None:
    spool = write(volume)
    kept = volume.quarantine(volume.path / "spool" / spool, "why", {"sop_instance": "1.2"})
    assert kept.read_bytes() == b"data"
    assert '"reason": "why"' in kept.with_suffix(".json").read_text()


def test_full_disk_is_an_error_and_discard_cleans_up(tmp_path: Path) -> None:
    create_marker(tmp_path / "disk")
    volume = FaultyVolume(tmp_path / "disk")
    spooled = volume.create()
    with pytest.raises(OSError, match="No space left"):
        spooled.write([bytes(2000)])
    spooled.discard()
    assert volume.spooled() == []


def test_no_marker_no_volume(tmp_path: Path) -> None:
    with pytest.raises(VolumeOffline):
        LocalVolume(tmp_path)
    create_marker(tmp_path)
    with pytest.raises(FileExistsError):
        create_marker(tmp_path)
