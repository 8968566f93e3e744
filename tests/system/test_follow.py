"""Unchanged PACS software on the pair: Orthanc follows the address, its images and its SQLite index on the share."""

import contextlib
import json
import shutil
import signal
import sqlite3
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ha.reach.followed import own_group
from tests.conftest import wait_for
from tests.system.conftest import SYNC_S, other_than, primary_of
from tests.system.smb import run
from tests.system.test_share import mounted, same_on_both
from tests.system.writer import Writer
from tools.lab.network import NODES, VIP, inside
from tools.lab.pair import Lab

PORT, HTTP_PORT, AET = 4242, 8042, "PACS"
STORAGE = "orthanc/storage"
INDEX = "orthanc/index"


def asked(path: str, body: bytes | None = None) -> Any:
    with urllib.request.urlopen(f"http://{VIP}:{HTTP_PORT}{path}", body, timeout=10) as answer:
        return json.load(answer)


def is_up() -> bool:
    with inside("client"), contextlib.suppress(OSError):
        return bool(asked("/system"))
    return False


def states(lab: Lab, node: str) -> dict[str, str]:
    status = lab.node_status(node)
    return dict(status["follow"]) if status else {}


def restart_agents(lab: Lab) -> None:
    """They end properly, and what follows the address with them; their settings are read anew."""
    for node in sorted(NODES, key=lambda one: one == lab.primary()):  # the primary's last
        pid = lab.pid(node, "ha")
        lab.kill(node, "ha", signal.SIGTERM)
        wait_for(lambda node=node, pid=pid: lab.pid(node, "ha") != pid, "the agent to be started again")
    wait_for(lab.in_sync, "the pair to be in sync", SYNC_S)


@pytest.fixture(scope="module")
def with_orthanc(running_lab: Lab) -> Iterator[Lab]:
    lab = running_lab
    before = {node: lab.config(node).read_text() for node in NODES}
    for node in NODES:
        files = lab.files(node)
        config = lab.node_dir(node) / "orthanc.json"
        config.write_text(
            json.dumps(
                {
                    "Name": "PACS",
                    "StorageDirectory": str(files / STORAGE),
                    "IndexDirectory": str(files / INDEX),
                    "DicomPort": PORT,
                    "DicomAet": AET,
                    "HttpPort": HTTP_PORT,
                    "RemoteAccessAllowed": True,
                    "AuthenticationEnabled": False,
                    "Plugins": [],
                }
            )
        )
        ask = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{HTTP_PORT}/system', timeout=5)"
        with lab.config(node).open("a") as file:
            file.write(
                f'\n[[cluster.follow]]\nname = "orthanc"\nstart = ["{shutil.which("Orthanc")}", "{config}"]\n'
                f'check = ["{sys.executable}", "-c", "{ask}"]\nstop_s = 30.0\n'
            )
    try:
        restart_agents(lab)
        yield lab
    finally:
        for node in NODES:
            lab.config(node).write_text(before[node])
        restart_agents(lab)


def test_it_runs_where_the_address_is_and_nowhere_else(with_orthanc: Lab, lab: Lab) -> None:
    primary = primary_of(lab)
    standby = other_than(primary)
    mounted(lab, primary, writable=True)
    wait_for(lambda: states(lab, primary) == {"orthanc": "running"} and is_up(), "Orthanc to run", SYNC_S)
    assert states(lab, standby) == {"orthanc": "stopped"}
    done = run(lab, primary, "tandem", "switchover")
    assert done.returncode == 0, done.stderr
    wait_for(lambda: states(lab, standby) == {"orthanc": "running"} and is_up(), "Orthanc on the other node", SYNC_S)
    wait_for(lambda: states(lab, primary) == {"orthanc": "stopped"}, "the status to say so")
    assert "follows the address: orthanc running" in run(lab, standby, "tandem", "status").stdout
    log = (lab.node_dir(primary) / "log" / "ha.log").read_text()
    assert "follow.killed" not in log.rpartition("ha.started")[2]  # it ended by itself


@pytest.mark.parametrize("fault", ["kill", "power", "switchover"])
def test_what_it_has_acknowledged_survives(with_orthanc: Lab, lab: Lab, fault: str) -> None:
    primary = primary_of(lab)
    wait_for(lambda: states(lab, primary) == {"orthanc": "running"} and is_up(), "Orthanc to run", SYNC_S)
    writer = Writer(lab, port=PORT, aet=AET)
    with writer:
        match fault:
            case "kill":
                kill_orthanc(lab, primary)
            case "power":
                lab.power_off(primary)
            case _:
                assert run(lab, primary, "tandem", "switchover").returncode == 0
        writer.wait_for_more(10, SYNC_S)
    now = primary_of(lab)
    assert (now == primary) == (fault == "kill")
    check(writer)
    if fault == "power":
        lab.power_on(primary)
    wait_for(lab.in_sync, "the pair to be in sync", SYNC_S)
    done = run(lab, now, "tandem", "switchover")
    assert done.returncode == 0, done.stderr
    wait_for(lambda: states(lab, other_than(now)) == {"orthanc": "running"} and is_up(), "Orthanc there", SYNC_S)
    check(writer)
    index_is_sound(mounted(lab, other_than(now), writable=True) / INDEX)


def check(writer: Writer) -> None:
    """Everything acknowledged is known to Orthanc, and its file is what Orthanc wrote."""
    wait_for(is_up, "Orthanc to answer", SYNC_S)
    with inside("client"):
        known = {one["MainDicomTags"]["SOPInstanceUID"]: one["ID"] for one in asked("/instances?expand")}
        assert not writer.acknowledged.keys() - known.keys()
        for uid in writer.acknowledged:
            asked(f"/instances/{known[uid]}/attachments/dicom/verify-md5", b"")


def index_is_sound(folder: Path) -> None:
    """As SQLite sees it, from a copy: Orthanc has it open."""
    copy = Path("/dev/shm") / f"tandem-index-{folder.stat().st_ino}"
    shutil.copytree(folder, copy)
    try:
        with contextlib.closing(sqlite3.connect(copy / "index")) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        shutil.rmtree(copy)


def kill_orthanc(lab: Lab, node: str) -> None:
    group = own_group() / f"tandem-follows-lab-{node}-orthanc"
    (group / "cgroup.kill").write_text("1")


def test_its_files_are_on_both_nodes(with_orthanc: Lab, lab: Lab) -> None:
    primary = primary_of(lab)
    wait_for(lambda: states(lab, primary) == {"orthanc": "running"}, "Orthanc to run", SYNC_S)
    with Writer(lab, port=PORT, aet=AET) as writer:
        writer.wait_for_more(10)
    lab.kill(primary, "mount")  # what it has open is lost: it is started anew, and that is no failure of its own
    mounted(lab, primary, writable=True)
    wait_for(lambda: states(lab, primary) == {"orthanc": "running"} and is_up(), "Orthanc to run again", SYNC_S)
    check(writer)
    same_on_both(lab)


def test_a_drill_says_whether_it_runs_again(with_orthanc: Lab, lab: Lab) -> None:
    primary = primary_of(lab)
    mounted(lab, primary, writable=True)
    wait_for(lambda: states(lab, primary) == {"orthanc": "running"} and is_up(), "Orthanc to run", SYNC_S)
    done = run(lab, primary, "tandem", "drill", "--yes", "--goal", "120", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["follow"] == {"orthanc": "running"}
