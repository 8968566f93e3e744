"""The contract of a volume, for each kind of it: a folder on a disk, and the simulation's faulty disk."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.objects.blob_store import digest_of
from storage.objects.describing import said_in_spool
from storage.objects.local_volume import LocalVolume, create_marker
from storage.objects.locks import InUse
from storage.objects.volume import DELETIONS, Volume, VolumeOffline
from storage.state.model import Location
from tests.simulation.machine import MemoryDisk, MemoryVolume

TREE = "patient/study/series/1.2.dcm"


def local(folder: Path) -> Volume:
    create_marker(folder)
    return LocalVolume(folder)


def memory(folder: Path) -> Volume:
    return MemoryVolume(MemoryDisk("memory", random.Random(1)), folder)


@pytest.fixture(params=[local, memory], ids=["local", "memory"])
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> Volume:
    make: Callable[[Path], Volume] = request.param
    return make(tmp_path / "disk")


def write(volume: Volume, data: bytes = b"data") -> str:
    spooled = volume.create()
    spooled.write([data[:2], data[2:]])
    spooled.finish()
    volume.sync_spool()
    return spooled.name


def read(volume: Volume, name: str) -> bytes:
    file = volume.open(name)
    try:
        return file.read(1 << 20)
    finally:
        file.close()


def at(volume: Volume, spool: str, path: str = "") -> Location:
    return Location(volume.id, spool, path)


def test_publish_moves_into_the_tree_and_can_be_repeated(volume: Volume) -> None:
    spool = write(volume)
    for _ in range(2):
        volume.sync_directories(volume.publish(spool, TREE))
    name = volume.locate(at(volume, spool, TREE))
    assert name == f"archive/{TREE}"
    assert read(volume, name) == b"data"
    assert volume.spooled() == []
    assert list(volume.archived()) == [TREE]


def test_what_was_never_written_can_not_be_published(volume: Volume) -> None:
    with pytest.raises(FileNotFoundError):
        volume.publish("nothing", "a/b/c/d.dcm")


def test_locate_finds_before_and_after_publication(volume: Volume) -> None:
    spool = write(volume)
    assert volume.locate(at(volume, spool)) == f"spool/{spool}"
    assert volume.locate(at(volume, spool, TREE)) == f"spool/{spool}"
    volume.publish(spool, TREE)
    assert volume.locate(at(volume, spool, TREE)) == f"archive/{TREE}"
    assert volume.locate(at(volume, "other")) is None


def test_digest_is_of_what_follows_the_header(volume: Volume) -> None:
    first, second = write(volume, b"header" + b"data"), write(volume, b"HEADER" + b"data")
    assert digest_of(volume, f"spool/{first}", 6) == digest_of(volume, f"spool/{second}", 6)
    assert volume.size(f"spool/{first}") == 10


def test_quarantine_and_remove_take_away(volume: Volume) -> None:
    kept, dropped = write(volume), write(volume)
    volume.quarantine(f"spool/{kept}", "why", {"sop_instance": "1.2"})
    volume.sync_quarantine()
    volume.remove(f"spool/{dropped}")
    volume.remove(f"spool/{dropped}")
    assert volume.spooled() == []
    with pytest.raises(FileNotFoundError):
        volume.open(f"spool/{kept}")


def test_discard_leaves_nothing(volume: Volume) -> None:
    spooled = volume.create()
    spooled.write([b"half"])
    spooled.discard()
    assert volume.spooled() == []


def test_quarantine_keeps_bytes_and_reason(tmp_path: Path) -> None:
    volume = local(tmp_path)
    spool = write(volume)
    volume.quarantine(f"spool/{spool}", "why", {"sop_instance": "1.2"})
    [note] = (tmp_path / "quarantine").glob("*.json")
    assert '"reason": "why"' in note.read_text()
    assert note.with_suffix(".dcm").read_bytes() == b"data"


def test_no_marker_no_volume(tmp_path: Path) -> None:
    with pytest.raises(VolumeOffline):
        LocalVolume(tmp_path)
    create_marker(tmp_path)
    with pytest.raises(FileExistsError):
        create_marker(tmp_path)


def test_draining_is_remembered(tmp_path: Path) -> None:
    volume = local(tmp_path)
    volume.set_draining(True)
    with pytest.raises(InUse):
        LocalVolume(tmp_path)
    volume.close()
    assert LocalVolume(tmp_path).draining


def test_a_volume_belongs_to_one_process(tmp_path: Path) -> None:
    volume = local(tmp_path)
    with pytest.raises(InUse, match="in use by process"):
        LocalVolume(tmp_path)
    volume.close()
    LocalVolume(tmp_path).close()


def test_nothing_is_published_over_a_file_that_lies_there(tmp_path: Path) -> None:
    volume = local(tmp_path)
    spool = write(volume)
    target = tmp_path / "archive" / TREE
    target.parent.mkdir(parents=True)
    target.write_bytes(b"put back by hand")
    volume.publish(spool, TREE)
    assert target.read_bytes() == b"data"
    (kept,) = (tmp_path / "quarantine").glob("*.dcm")
    assert kept.read_bytes() == b"put back by hand"


def test_another_disk_in_its_place_is_noticed(tmp_path: Path) -> None:
    volume = local(tmp_path)
    (tmp_path / "tandem-volume.json").unlink()
    with pytest.raises(VolumeOffline):
        volume.check()
    create_marker(tmp_path)
    with pytest.raises(VolumeOffline, match="another volume"):
        volume.check()


# -- the faults of the simulated disk ----------------------------------------------------------------------------------


def disk() -> MemoryDisk:
    return MemoryDisk("memory", random.Random(1))


def test_memory_disk_loses_only_what_was_not_synced() -> None:
    made = disk()
    volume = MemoryVolume(made, Path("/m"))
    synced = write(volume, b"synced")
    volume.sync_directories(volume.publish(synced, TREE))
    outcomes = set()
    for _ in range(50):
        spooled = volume.create()
        spooled.write([b"not synced"])
        made.cut_power()
        name = f"spool/{spooled.name}"
        outcomes.add(read(volume, name) if name in made.names else None)
        assert read(volume, f"archive/{TREE}") == b"synced"
    assert None in outcomes
    assert len(outcomes) > 3


def test_memory_disk_may_undo_a_rename_as_a_whole() -> None:
    outcomes = set()
    for _ in range(40):
        made = disk()
        made.rng = random.Random(len(outcomes) * 100 + _)
        volume = MemoryVolume(made, Path("/m"))
        spool = write(volume)
        volume.publish(spool, TREE)
        made.cut_power()
        found = sorted(made.names)
        assert len(found) == 1
        outcomes.add(found[0].split("/")[0])
    assert outcomes == {"spool", "archive"}


def test_memory_disk_fails_and_fills() -> None:
    made = disk()
    volume = MemoryVolume(made, Path("/m"))
    made.full = True
    with pytest.raises(OSError, match="No space"):
        volume.create()
    made.broken = True
    with pytest.raises(OSError, match="Input/output"):
        volume.free_bytes()


def test_an_object_is_read_from_anywhere_on(volume: Volume) -> None:
    spool = write(volume, b"header" + b"data")
    for at, wanted in ((0, b"header"), (6, b"data"), (9, b"a"), (10, b""), (99, b"")):
        file = volume.open(f"spool/{spool}", at)
        assert file.read(6) == wanted
        assert file.read(1) == (b"d" if at == 0 else b"")
        file.close()
    with pytest.raises(FileNotFoundError):
        volume.open("spool/nothing", 3)


def test_every_object_has_a_name(volume: Volume) -> None:
    first, second, third = write(volume), write(volume), write(volume)
    volume.publish(second, TREE)
    volume.quarantine(f"spool/{third}", "why", {})
    assert list(volume.names()) == [f"archive/{TREE}", f"spool/{first}"]


def test_bytes_are_amended_in_their_place(volume: Volume) -> None:
    spool = write(volume, b"header" + b"data")
    volume.amend(f"spool/{spool}", 2, b"AD")
    volume.amend(f"spool/{spool}", 2, b"AD", sync=True)
    file = volume.open(f"spool/{spool}")
    assert file.read(100) == b"heADerdata"
    file.close()
    with pytest.raises(FileNotFoundError):
        volume.amend("spool/nothing", 0, b"x")


def test_deletions_are_kept_in_their_order(volume: Volume) -> None:
    assert volume.deletions() == []
    volume.note_deletions([b"one", b"two"])
    volume.note_deletions([b"three"])
    assert volume.deletions() == [b"one", b"two", b"three"]


def test_a_torn_deletion_takes_no_other_with_it(tmp_path: Path) -> None:
    volume = local(tmp_path)
    volume.note_deletions([b"one"])
    with (tmp_path / DELETIONS).open("ab") as file:
        file.write(b"tor")
    volume.note_deletions([b"two"])
    assert volume.deletions() == [b"one", b"tor", b"two"]


def test_what_may_block_is_left_alone(tmp_path: Path) -> None:
    volume = local(tmp_path)
    os.mkfifo(tmp_path / "spool" / "pipe")
    (tmp_path / "spool" / "folder").mkdir()
    assert volume.spooled() == ["folder"]
    assert said_in_spool(volume, volume.spooled()) == {f"{volume.id}/folder": None}
