"""Which errors take a disk out of service."""

import errno
import os
from pathlib import Path

import pytest

from storage.objects.local_files import exchange, rename_new
from storage.objects.local_volume import LocalVolume, create_marker
from storage.objects.volumes import Volumes


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    create_marker(tmp_path / "disk")
    return Volumes([tmp_path / "disk"], 0)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOENT, errno.EMFILE, errno.EAGAIN])
def test_what_says_nothing_of_the_disk_leaves_it_in_service(volumes: Volumes, number: int) -> None:
    volume = next(iter(volumes))
    volumes.failed(volume.id, OSError(number, os.strerror(number)))
    assert volumes.serves(volume.id)


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_what_fails_goes_out_of_service(volumes: Volumes, number: int) -> None:
    volume = next(iter(volumes))
    volumes.failed(volume.id, OSError(number, os.strerror(number)))
    assert not volumes.serves(volume.id)
    assert volumes.slots[0].failed


def test_one_that_failed_is_taken_again_and_closes_nothing_of_others(volumes: Volumes, tmp_path: Path) -> None:
    first = next(iter(volumes))
    volumes.failed(first.id, OSError(errno.EIO, "Input/output error"))
    other = os.open(tmp_path, os.O_RDONLY)  # takes the number that was free just now
    with pytest.raises(OSError, match="Bad file descriptor"):
        first.sync_all()
    again = volumes.add(tmp_path / "disk")
    again.sync_all()
    os.fstat(other)
    os.close(other)


def test_a_disk_that_allows_nothing_at_all_goes_out_of_service(
    volumes: Volumes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: LocalVolume) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(LocalVolume, "check", refused)
    volumes.check_one(volumes.slots[0])
    assert volumes.slots[0].failed


def test_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"was-{name}").touch()
    exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "was-other").exists()
    assert (tmp_path / "other" / "was-one").exists()


def test_a_rename_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("one")
    (tmp_path / "other").write_text("other")
    with pytest.raises(FileExistsError):
        rename_new(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "other").read_text() == "other"
