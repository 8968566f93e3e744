"""The pair under faults, with a sender that never stops: whatever it heard Success for is there afterwards."""

import signal
import time

import pytest

from tests.conftest import wait_for
from tests.system.conftest import REPLICATION_PORT, heal, other_than, pid_of, primary_of
from tests.system.writer import Writer
from tools.lab.pair import Lab


def test_primary_loses_power(lab: Lab) -> None:
    lost = primary_of(lab)
    with Writer(lab) as writer:
        writer.wait_for_more(30)
        lab.power_off(lost)
        writer.wait_for_more(30)
        writer.stop()
        writer.check(other_than(lost))
    assert primary_of(lab) == other_than(lost)
    status = lab.node_status(other_than(lost))
    assert status is not None
    assert status["mode"] == "SOLO"
    assert status["single_copy"] > 0
    heal(lab)
    writer.check()
    after = lab.node_status(primary_of(lab))
    assert after is not None
    assert after["single_copy"] == 0


def test_backup_loses_power(lab: Lab) -> None:
    lost = other_than(primary_of(lab))
    with Writer(lab) as writer:
        writer.wait_for_more(20)
        lab.power_off(lost)
        writer.wait_for_more(30)
        lab.power_on(lost)
        writer.wait_for_more(20)
        wait_for(lab.in_sync, "the pair to be in sync under load", 120)
    writer.check()


def test_replication_link_is_cut(lab: Lab) -> None:
    primary = primary_of(lab)
    with Writer(lab) as writer:
        writer.wait_for_more(20)
        lab.cut_port(other_than(primary), REPLICATION_PORT)
        writer.wait_for_more(30)
        assert primary_of(lab) == primary
        lab.join_port(other_than(primary), REPLICATION_PORT)
        writer.wait_for_more(20)
    heal(lab)
    writer.check()


def test_primary_is_cut_from_all(lab: Lab) -> None:
    cut = primary_of(lab)
    with Writer(lab) as writer:
        writer.wait_for_more(20)
        lab.cut(cut, "all")
        writer.wait_for_more(30)
        isolated = lab.node_status(cut)
        assert isolated is None or not isolated["vips"]
    heal(lab)
    assert primary_of(lab) == other_than(cut)
    writer.check()


@pytest.mark.parametrize("process", ["gateway", "ha", "smbd", "etcd"])
def test_process_is_killed(lab: Lab, process: str) -> None:
    node = primary_of(lab)
    before = lab.pid(node, process)
    with Writer(lab) as writer:
        writer.wait_for_more(10)
        lab.kill(node, process)
        writer.wait_for_more(30)
    wait_for(lambda: pid_of(lab, node, process) not in (before, None), f"another {process}")
    heal(lab)
    writer.check()


@pytest.mark.parametrize("process", ["gateway", "ha"])
def test_process_hangs_past_the_lease(lab: Lab, process: str) -> None:
    node = primary_of(lab)
    with Writer(lab) as writer:
        writer.wait_for_more(10)
        lab.kill(node, process, signal.SIGSTOP)
        wait_for(lambda: lab.primary() == other_than(node), "the other node to take over")
        writer.wait_for_more(30)
        lab.kill(node, process, signal.SIGCONT)
        writer.wait_for_more(10)
    heal(lab)
    writer.check()


def test_node_without_the_newest_data_never_serves(lab: Lab) -> None:
    """The in-sync set was shrunk, then the primary dies too: the other stays down until the first is back."""
    primary = primary_of(lab)
    stale = other_than(primary)
    with Writer(lab) as writer:
        lab.power_off(stale)
        writer.wait_for_more(30)
    lab.power_off(primary)
    lab.power_on(stale)
    wait_for(lambda: (lab.node_status(stale) or {}).get("etcd"), "the stale node to see etcd")
    for _ in range(100):  # longer than two leases
        status = lab.node_status(stale)
        assert status is None or status["role"] == "standby"
        time.sleep(0.15)
    lab.power_on(primary)
    heal(lab)
    assert primary_of(lab) == primary
    writer.check()
