"""Recovery on a real gateway process: killed, cut short, or with its bytes damaged while it was down."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.objects.blob_store import digest_of
from storage.objects.incoming import INLINE_BYTES_MAX
from storage.objects.local_volume import LocalVolume, create_marker
from storage.state.catalogue import Catalogue
from storage.state.model import Location
from tests.builders import item
from tests.conftest import Gateway, wait_for
from tools.cli.dicom_client import store_command
from tools.lab.samples import archived


def stored(gateway: Gateway, count: int) -> list[str]:
    items = [item() for _ in range(count)]
    with gateway.client(*items) as client:
        assert all(client.store(one) == 0 for one in items)
    return [one.sop_instance for one in items]


def location_of(gateway: Gateway, uid: str) -> Location:
    catalogue = Catalogue.open(gateway.folder / "state" / "catalogue", 1 << 30)
    instance = catalogue.instance(uid)
    assert instance is not None
    location = catalogue.location(instance.seq)
    catalogue.close()
    assert location is not None
    return location


def test_killed_at_once_after_success(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    uids = stored(gateway, 20)
    gateway.stop(signal.SIGKILL)
    gateway.start()
    assert gateway.status()["instances"] == 20
    wait_for(lambda: set(uids) <= set(archived([gateway.volume])), "the files to be published")


def test_tree_renames_that_were_lost_are_done_again(new_gateway: Callable[..., Gateway]) -> None:
    """A power cut may undo renames that were not synced: the file is in the spool again."""
    gateway = new_gateway()
    [uid] = stored(gateway, 1)
    wait_for(lambda: uid in archived([gateway.volume]), "the file")
    gateway.stop(signal.SIGKILL)
    location = location_of(gateway, uid)
    path = archived([gateway.volume])[uid]
    path.rename(gateway.volume / "spool" / location.spool)
    gateway.start()
    assert path.exists()


def test_leftovers_in_the_spool_are_removed(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    gateway.stop(signal.SIGKILL)
    (gateway.volume / "spool" / "half").write_bytes(b"half an object")
    gateway.start()
    assert not (gateway.volume / "spool" / "half").exists()


@pytest.mark.parametrize("logged", [True, False])
def test_damage_is_noticed(new_gateway: Callable[..., Gateway], logged: bool) -> None:
    """And made good again from the log, which has the bytes of short objects until a checkpoint."""
    gateway = new_gateway()
    one = item() if logged else item(PixelData=bytes(INLINE_BYTES_MAX))
    with gateway.client(one) as client:
        assert client.store(one) == 0
    wait_for(lambda: one.sop_instance in archived([gateway.volume]), "the file")
    gateway.stop(signal.SIGKILL)
    path = archived([gateway.volume])[one.sop_instance]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    gateway.start()
    assert ("recovery.lost" in gateway.log()) != logged
    assert gateway.status()["catch_up"]["missing"] == (0 if logged else 1)
    found = archived([gateway.volume]).get(one.sop_instance)
    assert (found is not None and found.read_bytes().endswith(one.data)) == logged


def test_digest_is_of_the_data_set(tmp_path: Path) -> None:
    create_marker(tmp_path)
    volume = LocalVolume(tmp_path)
    (tmp_path / "1").write_bytes(b"header" + b"data")
    (tmp_path / "2").write_bytes(b"HEADER" + b"data")
    assert digest_of(volume, "1", 6) == digest_of(volume, "2", 6)
    assert digest_of(volume, "1", 6)[1] == 10


def test_sender_that_leaves_before_the_response_loses_nothing(new_gateway: Callable[..., Gateway]) -> None:
    """The entry is in the log when the connection ends: its bytes must stay, and the gateway must go on."""
    gateway = new_gateway()
    items = [item() for _ in range(40)]
    for one in items:
        client = gateway.client(one)
        command = store_command(1, one.sop_class, one.sop_instance)
        client.send_raw(client.pdvs(1, command, command=True) + client.pdvs(1, one.data, command=False))
        client.close()
    with gateway.client(items[0]) as client:
        assert client.store(items[0]) == 0
    assert gateway.process is not None
    assert gateway.process.poll() is None
    count = gateway.status()["instances"]
    wait_for(lambda: len(archived([gateway.volume])) == count, "every entry's file")
    assert gateway.stop() == 0


def test_repeat_of_an_object_whose_copy_is_gone_brings_it_back(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    one = item()
    with gateway.client(one) as client:
        assert client.store(one) == 0
        path = wait_for(lambda: archived([gateway.volume]).get(one.sop_instance), "the file")
        path.unlink()
        assert client.store(one) == 0
    restored = wait_for(lambda: archived([gateway.volume]).get(one.sop_instance), "the file again")
    assert restored.read_bytes().endswith(one.data)
    assert gateway.status()["catch_up"]["missing"] == 0


def test_disk_away_at_start_takes_nothing_with_it(new_gateway: Callable[..., Gateway]) -> None:
    """Killed with a full tail; one disk isn't mounted at the next start, and is back at the one after."""
    gateway = new_gateway()
    other = gateway.folder / "other"
    gateway.stop()
    create_marker(other)
    gateway.environment["TANDEM__STORAGE__VOLUMES"] = json.dumps([str(gateway.volume), str(other)])
    gateway.start()
    uids = stored(gateway, 30)
    gateway.stop(signal.SIGKILL)
    other.rename(gateway.folder / "unplugged")
    gateway.start()
    stored(gateway, 3)
    gateway.stop(signal.SIGKILL)
    (gateway.folder / "unplugged").rename(other)
    gateway.start()
    assert gateway.status()["instances"] == 33
    assert gateway.status()["catch_up"]["missing"] == 0
    gateway.stop()
    held = {path.stem for volume in (gateway.volume, other) for path in (volume / "archive").rglob("*.dcm")}
    spooled = sum(len(list((volume / "spool").iterdir())) for volume in (gateway.volume, other))
    assert len(held & set(uids)) + spooled >= 30


def test_rename_lost_twice_does_not_lose_the_object(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    [uid] = stored(gateway, 1)
    wait_for(lambda: uid in archived([gateway.volume]), "the file")
    gateway.stop()  # a clean stop moves the checkpoint past it
    path = archived([gateway.volume])[uid]
    location = location_of(gateway, uid)
    path.rename(gateway.volume / "spool" / location.spool)
    gateway.start()
    kept = [path, gateway.volume / "spool" / location.spool]
    assert any(copy.exists() for copy in kept)
