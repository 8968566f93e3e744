"""A lab for the system tests: real processes in network namespaces, ended whatever happens."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tools.lab import network as lab_network
from tools.lab.network import HUB, MEMBERS, NODES, LabError, namespace, namespaces
from tools.lab.pair import Lab

TTL_S = 5.0
SYNC_S = 120.0
TEST_S = 600  # healing before it, twice SYNC_S at most, and making the lab anew included
VOLUMES = 2
REPLICATION_PORT = 11200
DISK_MB = 2500


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/system/" in str(item.path):
            item.add_marker(pytest.mark.system)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TEST_S))
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs root for network namespaces"))


@pytest.fixture(scope="session")
def running_lab() -> Iterator[Lab]:
    if HUB in namespaces():
        pytest.fail("a lab is up already; `tandem lab down` ends it")
    base = Path(tempfile.mkdtemp(prefix="tandem-test-", dir="/dev/shm"))
    lab = Lab(base)
    try:
        lab.up(TTL_S, VOLUMES, DISK_MB)  # real file systems: cut power loses what wasn't synced
        yield lab
    finally:
        keep_logs(lab, "last")
        lab.down(keep_data=False)
        shutil.rmtree(base, ignore_errors=True)


def keep_logs(lab: Lab, name: str) -> None:
    """For who looks for what a test has found: what the nodes have said goes to $TANDEM_TEST_LOGS."""
    folder = os.environ.get("TANDEM_TEST_LOGS")
    if folder:
        for node in NODES:
            shutil.copytree(lab.node_dir(node) / "log", Path(folder) / name / node, dirs_exist_ok=True)


@pytest.fixture
def lab(running_lab: Lab) -> Lab:
    """The lab, healed and in sync. One that can't be healed fails this test, with what its nodes say of themselves, and
    is made anew for the next."""
    try:
        heal(running_lab)
    except (Exception, pytest.fail.Exception) as error:
        said = "\n".join(f"{node}: {json.dumps(running_lab.node_status(node))}" for node in NODES)
        renew(running_lab)
        raise AssertionError(f"{error}\n{said}") from error
    return running_lab


def heal(lab: Lab) -> None:
    for node in MEMBERS:
        if namespace(node) not in namespaces():
            lab.power_on(node)
            continue
        lab.thaw(node)
        lab.join(node, "all")
        for other in (*MEMBERS, "client", REPLICATION_PORT, *(f"etcd_{member}" for member in MEMBERS)):
            lab_network.mend(node, other)
    for node in NODES:
        for number in range(1, VOLUMES + 1):
            lab.disks(node).empty(number)
    wait_for(lab.in_sync, "the pair to be in sync", SYNC_S)
    mend_disks(lab)
    wait_for(lambda: healed(lab), "every copy to be there", SYNC_S)


def renew(lab: Lab) -> None:
    """A lab with nothing in it, for a test that loses both copies of what others have stored."""
    keep_logs(lab, f"before-{time.time():.0f}")
    lab.down(keep_data=False)
    lab.dir.mkdir(exist_ok=True)
    lab.up(TTL_S, VOLUMES, DISK_MB)


def mend_disks(lab: Lab) -> None:
    """A new disk for each that a test has left dead."""
    for node in NODES:
        status = lab.node_status(node)
        for number, volume in enumerate(sorted(lab.volumes(node)), 1):
            rows = status["nodes"][node]["volumes"] if status else []
            state = next((row["state"] for row in rows if row["path"] == str(volume)), "online")
            if state.startswith(("failed", "offline")):
                lab.replace_disk(node, number)


def healed(lab: Lab) -> bool:
    found = [lab.node_status(node) for node in NODES]
    return all(status and status["healing"]["missing"] == 0 and status["single_copy"] == 0 for status in found)


def volume_states(lab: Lab, node: str) -> list[str]:
    status = lab.node_status(node)
    return [row["state"] for row in status["nodes"][node]["volumes"]] if status else []


def other_than(node: str) -> str:
    return "b" if node == "a" else "a"


def primary_of(lab: Lab) -> str:
    return str(wait_for(lab.primary, "a primary"))


def pid_of(lab: Lab, node: str, process: str = "gateway") -> int | None:
    """None while the process isn't there."""
    try:
        return lab.pid(node, process)
    except LabError:
        return None
