"""Orders of an operator on a real gateway that runs alone: volumes, scrub, delete, quarantine, get, rebuild."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.settings import DicomSettings, Settings
from storage.control_client import OrderFailed, order
from storage.objects.incoming import INLINE_BYTES_MAX
from tests.builders import item
from tests.conftest import ROOT, Gateway, wait_for
from tools.cli.dicom_client import DicomClient, Object
from tools.cli.operate import fetch
from tools.cli.options import Failure
from tools.cli.quarantine import RestoreFailed, restore
from tools.lab.samples import archived


def ordered(gateway: Gateway, name: str, **given: Any) -> dict[str, Any]:
    return order(gateway.folder / "standalone.sock", name, given)


def stored(gateway: Gateway, count: int) -> list[Object]:
    items = [item() for _ in range(count)]
    with gateway.client(*items) as client:
        assert all(client.store(one) == 0 for one in items)
    wait_for(lambda: {one.sop_instance for one in items} <= set(archived([gateway.volume])), "the files")
    return items


def study_of(gateway: Gateway, one: Object) -> str:
    at = one.data.index(b"\x20\x00\x0d\x00UI") + 6
    length = int.from_bytes(one.data[at : at + 2], "little")
    return one.data[at + 2 : at + 2 + length].rstrip(b"\0").decode()


def test_delete_takes_away_and_keeps_aside(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    first, second = stored(gateway, 2)
    with pytest.raises(OrderFailed, match="needs a reason"):
        ordered(gateway, "delete", study=study_of(gateway, first), reason=" ", by="test")
    assert ordered(gateway, "delete", study=study_of(gateway, first), reason="test", by="test") == {"deleted": 1}
    assert gateway.status()["instances"] == 1
    wait_for(lambda: set(archived([gateway.volume])) == {second.sop_instance}, "the file to be gone")
    [kept] = ordered(gateway, "quarantine-list")["objects"]
    assert kept["sop_instance"] == first.sop_instance
    assert kept["reason"] == "deleted: test"
    # It may be stored again, and is kept over a restart.
    with gateway.client(first) as client:
        assert client.store(first) == 0
    gateway.stop(signal.SIGKILL)
    gateway.start()
    assert gateway.status()["instances"] == 2
    wait_for(lambda: first.sop_instance in archived([gateway.volume]), "the file again")


def test_deleted_stays_deleted_over_a_crash(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    [one] = stored(gateway, 1)
    ordered(gateway, "delete", study=study_of(gateway, one), reason="test", by="test")
    gateway.stop(signal.SIGKILL)
    gateway.start()
    assert gateway.status()["instances"] == 0
    wait_for(lambda: not archived([gateway.volume]), "the file to be gone")


def test_purge_deletes_for_good(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    [one] = stored(gateway, 1)
    ordered(gateway, "delete", study=study_of(gateway, one), reason="test", by="test")
    wait_for(lambda: ordered(gateway, "quarantine-list")["objects"], "the quarantine")
    assert ordered(gateway, "quarantine-purge", older_than_days=1) == {"purged": 0}
    assert ordered(gateway, "quarantine-purge", older_than_days=0) == {"purged": 1}
    assert not list((gateway.volume / "quarantine").iterdir())


def test_volume_is_added_drained_and_retired_while_running(new_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    gateway = new_gateway()
    items = stored(gateway, 10)
    other = tmp_path / "other"
    ordered(gateway, "volume-add", path=str(other))
    with pytest.raises(OrderFailed, match="still holds 10"):
        ordered(gateway, "volume-retire", path=str(gateway.volume))
    drained = ordered(gateway, "volume-drain", path=str(gateway.volume))
    assert drained == {"moved": 10, "left": 0, "files_moved": 0, "files_left": 0, "why": ""}
    wait_for(lambda: not archived([gateway.volume]), "the old copies to be gone")
    assert set(archived([other])) == {one.sop_instance for one in items}
    ordered(gateway, "volume-retire", path=str(gateway.volume))
    with gateway.client(*items) as client:
        assert all(client.store(one) == 0 for one in items)
    assert ordered(gateway, "scrub") == {"checked": 10, "bad": 0, "strangers": 0}
    gateway.stop()
    gateway.start()  # the added volume is remembered, though the settings don't name it
    assert ordered(gateway, "scrub")["checked"] == 10


def test_get_checks_what_it_gives(new_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    gateway = new_gateway()
    one = item(PixelData=bytes(INLINE_BYTES_MAX))  # the log hasn't got it
    with gateway.client(one) as client:
        assert client.store(one) == 0
    target = tmp_path / "got.dcm"
    config = tmp_path / "node.toml"
    config.write_text(f'[node]\nrun_dir = "{gateway.folder}"\n')
    assert fetch(config, one.sop_instance, target) == "this node"
    assert target.read_bytes()[128:132] == b"DICM"
    assert target.read_bytes().endswith(one.data)
    with pytest.raises(Failure, match="No such file"):
        fetch(config, one.sop_instance, tmp_path / "nowhere" / "got.dcm")
    path = archived([gateway.volume])[one.sop_instance]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(OrderFailed, match="temporarily unavailable"):
        ordered(gateway, "get", sop_instance=one.sop_instance)
    with pytest.raises(OrderFailed, match="isn't stored here"):
        ordered(gateway, "get", sop_instance="1.2.3")


def test_what_was_replaced_by_mistake_is_restored(new_gateway: Callable[..., Gateway]) -> None:
    gateway, one = new_gateway(), item()
    mistake = Object(one.sop_class, one.sop_instance, one.transfer_syntax, one.data[:-1] + b"!")
    context = [(one.sop_class, one.transfer_syntax)]
    with DicomClient("127.0.0.1", gateway.port, "TANDEM", context, 30, calling="CT1") as client:
        assert [client.store(one), client.store(mistake)] == [0, 0]
    settings = Settings(dicom=DicomSettings(port=gateway.port))
    kept = wait_for(lambda: ordered(gateway, "quarantine-list")["objects"], "the first version to be set aside")[0]
    restore(Path(kept["file"]), settings)
    wait_for(lambda: archived([gateway.volume])[one.sop_instance].read_bytes().endswith(one.data), "the first version")
    with DicomClient("127.0.0.1", gateway.port, "TANDEM", context, 30, calling="CT2") as client:
        assert client.store(mistake) == 0x0111
    rows = ordered(gateway, "quarantine-list")["objects"]
    refused = next(row for row in rows if "is taken" in row["reason"])
    with pytest.raises(RestoreFailed, match="`tandem delete` that one first"):
        restore(Path(refused["file"]), settings)


def test_unknown_orders_are_refused(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    with pytest.raises(OrderFailed, match="unknown order"):
        ordered(gateway, "dance")
    with pytest.raises(OrderFailed, match="volume-add"):
        ordered(gateway, "volume-add", way="x")
    with pytest.raises(OrderFailed, match="TANDEM_FAULTS"):
        ordered(gateway, "crash", point="journal.before_commit")


def test_map_of_the_catalogue_grows(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway(TANDEM__STORAGE__MAP_SIZE_BYTES=str(1 << 20))
    for _ in range(6):
        stored(gateway, 100)
    assert gateway.status()["instances"] == 600
    assert "catalogue.grown" in gateway.log()


def test_rebuilt_index_is_the_same(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    items = stored(gateway, 20)
    before = gateway.status()
    gateway.stop()
    (gateway.volume / "archive" / "broken.dcm").write_bytes(b"not DICOM")
    found = json.loads(gateway.rebuild_index("--json"))
    assert (found["instances"], found["unreadable"]) == (20, 1)
    gateway.start()
    after = gateway.status()
    assert [after[key] for key in ("instances", "studies", "bytes")] == [
        before[key] for key in ("instances", "studies", "bytes")
    ]
    assert ordered(gateway, "scrub") == {"checked": 20, "bad": 0, "strangers": 1}
    with gateway.client(*items) as client:
        assert all(client.store(one) == 0 for one in items)
    assert gateway.status()["commit"] == 20


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
def test_what_root_makes_belongs_to_the_gateways_user(tmp_path: Path) -> None:
    state, disk, config = tmp_path / "state", tmp_path / "disk", tmp_path / "node.toml"
    for folder in (state, disk):
        folder.mkdir()
    os.chown(state, 12345, 12346)
    config.write_text(f'[node]\nrun_dir = "{tmp_path}"\n[storage]\nstate = "{state}"\nvolumes = ["{disk}"]\n')

    def tandem(*words: str) -> str:
        command = [sys.executable, "-m", "tools", *words, "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        return done.stderr if done.returncode else ""

    assert "isn't a mount point" in tandem("volume", "add", str(disk))  # a disk that isn't mounted
    assert not any(disk.iterdir())
    os.chown(disk, 12345, 12346)
    assert "mount it first" in tandem("rebuild-index")  # no volume yet
    assert not tandem("volume", "add", str(disk))
    assert not tandem("rebuild-index")
    made = [disk, *disk.iterdir(), *state.rglob("*")]
    assert state / "catalogue" / "data.mdb" in made
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(12345, 12346)}


def test_damaged_catalogue_is_not_guessed_at(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    stored(gateway, 200)
    gateway.stop(signal.SIGKILL)
    file = gateway.folder / "state" / "catalogue" / "data.mdb"
    (file.parent / "open").write_text("an earlier boot")
    raw = bytearray(file.read_bytes())
    for at in range(4096 * 2, len(raw), 4096 * 2):
        raw[at : at + 2048] = b"\xff" * len(raw[at : at + 2048])
    file.write_bytes(raw)
    with pytest.raises(AssertionError, match="rebuild-index"):
        gateway.start()
