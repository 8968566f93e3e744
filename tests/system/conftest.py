"""A lab for the system tests: real processes in network namespaces, ended whatever happens."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tools.lab import HUB, NODES, Lab, LabError, namespace, namespaces

TTL_S = 5.0
SYNC_S = 120.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/system/" in str(item.path):
            item.add_marker(pytest.mark.system)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs root for network namespaces"))


@pytest.fixture(scope="session")
def running_lab() -> Iterator[Lab]:
    if HUB in namespaces():
        pytest.fail("a lab is up already; `tandem lab down` ends it")
    base = Path(tempfile.mkdtemp(prefix="tandem-test-", dir="/dev/shm"))
    lab = Lab(base)
    try:
        lab.up(TTL_S, 2)
        yield lab
    finally:
        failed = os.environ.get("TANDEM_TEST_LOGS")
        if failed:
            for node in NODES:
                shutil.copytree(lab.node_dir(node) / "log", Path(failed) / node, dirs_exist_ok=True)
        lab.down(keep_data=False)
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def lab(running_lab: Lab) -> Lab:
    """The lab, healed and in sync."""
    heal(running_lab)
    return running_lab


def heal(lab: Lab) -> None:
    for node in NODES:
        if namespace(node) not in namespaces():
            lab.power_on(node)
            continue
        lab.thaw(node)
        lab.join(node, "all")
        for other in ("a", "b", "w", "client"):
            lab.join(node, other)
        with contextlib.suppress(LabError):
            lab.join_port(node, 11200)
    wait_for(lab.in_sync, "the pair to be in sync", SYNC_S)


def other_than(node: str) -> str:
    return "b" if node == "a" else "a"


def primary_of(lab: Lab) -> str:
    return str(wait_for(lab.primary, "a primary"))
