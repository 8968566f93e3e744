"""Data are safe from a second process, from a cloned disk, and from tools that run at the wrong time."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from conf.settings import load
from storage.control_client import order
from storage.objects.local_volume import create_marker
from storage.state.catalogue import FORMAT, Batch, Catalogue
from tests.builders import item, uid_of
from tests.conftest import ROOT, Gateway, wait_for
from tools.cli.rebuild_command import rebuild_index
from tools.rebuild import making as rebuild


def tandem(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, stdin=subprocess.DEVNULL)


def settings(gateway: Gateway, *volumes: Path, peer: bool = False) -> Path:
    config = gateway.folder / "node.toml"
    listed = ", ".join(f'"{path}"' for path in volumes or (gateway.volume,))
    text = f'[node]\nname = "a"\nrun_dir = "{gateway.folder}"\n[storage]\nstate = "{gateway.folder / "state"}"\n'
    text += f"volumes = [{listed}]\n[dicom]\nport = {gateway.port}\nbind = '127.0.0.1'\n"
    if peer:
        text += (
            '[cluster]\naddress = "127.0.0.1"\npeer = "b"\npeer_address = "127.0.0.2"\netcd = ["http://127.0.0.1:1"]\n'
        )
    config.write_text(text)
    return config


def stored(gateway: Gateway, count: int = 5) -> None:
    items = [item() for _ in range(count)]
    with gateway.client(*items) as client:
        assert all(client.store(one) == 0 for one in items)


def test_a_second_gateway_on_the_same_folders_gets_one_line(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    stored(gateway)
    done = tandem("gateway", "--data", str(gateway.folder), "--port", "1")
    assert done.returncode == 1
    assert "in use by process" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    stored(gateway)
    assert gateway.status()["instances"] == 10
    assert gateway.quarantined() == []


@pytest.mark.parametrize("words", [("rebuild-index",), ("volume", "add")])
def test_tools_leave_folders_in_use_alone(new_gateway: Callable[..., Gateway], words: tuple[str, ...]) -> None:
    """Also while the gateway doesn't answer on its socket, as at a long start."""
    gateway = new_gateway()
    stored(gateway)
    assert gateway.process
    config = settings(gateway)
    (gateway.folder / "a.sock").unlink(missing_ok=True)
    more = (str(gateway.volume),) if words[0] == "volume" else ()
    done = tandem(*words, *more, "--config", str(config))
    assert done.returncode == 1
    assert "in use" in done.stderr or "volume already" in done.stderr
    assert gateway.status()["instances"] == 5


def test_a_cloned_disk_is_not_taken_for_another(new_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    gateway = new_gateway()
    stored(gateway)
    gateway.stop()
    shutil.copytree(gateway.volume, tmp_path / "clone")
    done = tandem("gateway", "--config", str(settings(gateway, gateway.volume, tmp_path / "clone")))
    assert done.returncode == 1
    assert "clone" in done.stderr


def test_a_newer_format_is_refused(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    gateway.stop()
    catalogue = Catalogue.open(gateway.folder / "state" / "catalogue", 1 << 26)
    catalogue.write(Batch(meta={"format": FORMAT + 1}))
    catalogue.close()
    done = tandem("gateway", "--data", str(gateway.folder))
    assert done.returncode == 1
    assert f"format {FORMAT + 1}" in done.stderr


def test_the_folder_of_a_log_is_one_nodes(new_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    log = json.dumps(str(tmp_path / "log"))
    stored(new_gateway(TANDEM__STORAGE__LOG=log))
    other = Gateway(tmp_path / "other", TANDEM__STORAGE__LOG=log)
    with pytest.raises(AssertionError, match="the gateway ended"):
        other.start()
    assert f"{tmp_path / 'log'} is in use by process" in other.log()


def test_rebuild_from_files_in_a_pair_needs_a_word(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    stored(gateway)
    gateway.stop()
    config = settings(gateway, peer=True)
    done = tandem("rebuild-index", "--from", "files", "--config", str(config))
    assert done.returncode == 2
    assert "--from peer" in done.stderr
    catalogue = Catalogue.open(gateway.folder / "state" / "catalogue", 1 << 26)
    before = catalogue.meta("lineage", "")
    catalogue.close()
    done = tandem("rebuild-index", "--from", "files", "--disaster", "--yes", "--config", str(config), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["instances"] == 5
    catalogue = Catalogue.open(gateway.folder / "state" / "catalogue", 1 << 26)
    assert catalogue.meta("lineage", "") not in ("", before)
    catalogue.close()


def files_of(gateway: Gateway) -> list[Path]:
    return sorted((gateway.volume / "archive").rglob("*.dcm"))


def rebuilt(gateway: Gateway) -> dict[str, int]:
    done = tandem("rebuild-index", "--config", str(settings(gateway)), "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("in_log", [True, False])
def test_rot_does_not_become_the_truth(new_gateway: Callable[..., Gateway], in_log: bool) -> None:
    gateway = new_gateway()
    stored(gateway)
    gateway.stop()
    if not in_log:
        shutil.rmtree(gateway.folder / "state" / "log")
    victim = files_of(gateway)[0]
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    assert rebuilt(gateway)["damaged"] == 1
    gateway.start()
    status = gateway.status()
    assert (status["instances"], status["catch_up"]["missing"]) == (5, 0 if in_log else 1)


def test_rot_is_seen_without_the_old_catalogue_too(new_gateway: Callable[..., Gateway]) -> None:
    """By what the file itself says that it was."""
    gateway = new_gateway()
    stored(gateway)
    gateway.stop()
    victim = files_of(gateway)[0]
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    with victim.open("r+b") as file:
        file.write(raw)
    shutil.rmtree(gateway.folder / "state" / "catalogue")
    found = rebuilt(gateway)
    assert (found["instances"], found["damaged"]) == (5, 1)  # the log still had it


def test_what_was_acknowledged_and_not_published_is_found(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    stored(gateway)
    gateway.stop(signal.SIGKILL)
    for file in files_of(gateway)[:3]:  # as a power cut undoes the renames
        file.rename(gateway.volume / "spool" / f"x-{file.stem[-8:]}")
    shutil.rmtree(gateway.folder / "state" / "catalogue")
    assert rebuilt(gateway)["instances"] == 5
    gateway.start()
    assert gateway.status()["instances"] == 5
    assert order(gateway.folder / "standalone.sock", "scrub", {}) == {"checked": 5, "bad": 0, "strangers": 0}
    assert len(files_of(gateway)) == 5


def test_deleted_stays_deleted(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    items = [item(), item()]
    with gateway.client(*items) as client:
        assert all(client.store(one) == 0 for one in items)
    assert gateway.status()["instances"] == 2  # published by then
    gone = files_of(gateway)[0]
    copy = gone.read_bytes()
    uid = gone.stem
    study = next(one for one in items if one.sop_instance == uid)
    socket = gateway.folder / "standalone.sock"
    wanted = uid_of(study.data, 0x0020_000D)
    assert order(socket, "delete", {"study": wanted, "reason": "test", "by": "test"}) == {"deleted": 1}
    gateway.stop()
    gone.parent.mkdir(parents=True, exist_ok=True)
    gone.write_bytes(copy)  # as a disk that was away would bring it back
    found = rebuilt(gateway)
    assert (found["instances"], found["deleted"]) == (1, 1)


@pytest.mark.parametrize("at", ["tools.rebuild.making.Rebuilding.finish", "tools.rebuild.making._put_in_place"])
def test_a_rebuild_that_is_ended_leaves_the_old_catalogue(
    new_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    gateway = new_gateway()
    stored(gateway)
    gateway.stop()

    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    loaded = load(settings(gateway), {})
    volumes = rebuild.open_volumes(loaded)
    monkeypatch.setattr(at, ended)
    with pytest.raises(KeyboardInterrupt):
        rebuild.from_files(loaded, volumes, lambda _: None)
    monkeypatch.undo()
    for volume in volumes:
        volume.close()
    gateway.start()
    assert gateway.status()["instances"] == 5
    gateway.stop()
    assert rebuilt(gateway)["instances"] == 5  # whatever was left of the first one


def test_a_killed_worker_leaves_the_old_catalogue(
    new_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel does when memory runs out."""
    gateway = new_gateway()
    stored(gateway)
    gateway.stop()
    before = sorted((gateway.folder / "state").iterdir())
    monkeypatch.setattr("tools.rebuild.files.read_one", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    done = CliRunner().invoke(rebuild_index, ["--config", str(settings(gateway))])
    assert done.exit_code == 1
    assert "the old catalogue is where it was" in done.output
    assert sorted((gateway.folder / "state").iterdir()) == before


def test_a_disk_that_was_added_while_running_is_in_the_new_index(
    new_gateway: Callable[..., Gateway], tmp_path: Path
) -> None:
    gateway = new_gateway()
    socket = gateway.folder / "standalone.sock"
    create_marker(tmp_path / "second")
    order(socket, "volume-add", {"path": str(tmp_path / "second")})
    order(socket, "volume-drain", {"path": str(gateway.volume)})
    stored(gateway)
    assert gateway.status()["instances"] == 5
    assert len(list((tmp_path / "second" / "archive").rglob("*.dcm"))) == 5
    gateway.stop()
    assert rebuilt(gateway)["instances"] == 5
    gateway.start()
    assert gateway.status()["instances"] == 5
    assert order(socket, "scrub", {}) == {"checked": 5, "bad": 0, "strangers": 0}


def test_two_versions_in_the_spool_are_told_apart(new_gateway: Callable[..., Gateway]) -> None:
    """Neither takes the place of the other, and the one that counts stays where it is found."""
    gateway = new_gateway()
    first = item(PatientName="One")
    again = dataclasses.replace(first, data=first.data.replace(b"One", b"Two"))
    with gateway.client(first) as client:
        assert [client.store(first), client.store(again)] == [0, 0]
    assert gateway.status()["instances"] == 1
    wait_for(lambda: len(files_of(gateway)) == 1 and len(gateway.quarantined()) == 1, "the first to be put aside")
    gateway.stop(signal.SIGKILL)
    kept, old = files_of(gateway)[0], next((gateway.volume / "quarantine").glob("*.dcm"))
    kept.rename(gateway.volume / "spool" / "x-2")
    old.rename(gateway.volume / "spool" / "x-1")
    shutil.rmtree(gateway.folder / "state" / "catalogue")
    assert rebuilt(gateway)["instances"] == 1
    gateway.start()
    assert gateway.status()["instances"] == 1
    assert order(gateway.folder / "standalone.sock", "scrub", {})["bad"] == 0
    assert gateway.status()["catch_up"]["missing"] == 0
    assert len(files_of(gateway)) == 1


def test_a_rebuild_by_root_leaves_all_to_the_gateways_user(new_gateway: Callable[..., Gateway]) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    gateway = new_gateway()
    stored(gateway)
    gateway.stop(signal.SIGKILL)
    for file in files_of(gateway):
        file.rename(gateway.volume / "spool" / f"x-{file.stem[-8:]}")
    shutil.rmtree(gateway.volume / "archive")
    for path in [gateway.folder / "state", *(gateway.folder / "state").rglob("*"), *gateway.volume.rglob("*")]:
        os.chown(path, 1234, 1234, follow_symlinks=False)
    assert rebuilt(gateway)["instances"] == 5
    made = [*(gateway.folder / "state").rglob("*"), *gateway.volume.rglob("*")]
    assert len(files_of(gateway)) == 5
    assert {str(path): path.stat().st_uid for path in made if path.stat().st_uid != 1234} == {}
