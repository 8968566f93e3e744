"""Faults of network, etcd and clock, with a writer, a reader and a sniffer that watch from outside. See checkers.py."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.system.checkers import Watched
from tests.system.conftest import TTL_S, heal, healed, other_than, pid_of, primary_of
from tests.system.test_switchover import asked, tandem
from tools.lab.network import ADDRESSES, ETCD_CLIENT_PORT, MEMBERS
from tools.lab.pair import Lab

OUT_OF_RESOURCES = 0xA700
ROOT = Path(__file__).parent.parent.parent


def mode(lab: Lab, node: str) -> str:
    return str((lab.node_status(node) or {}).get("mode"))


def etcd_leader(lab: Lab) -> str:
    """The member that leads etcd, which may be electing one at this moment."""
    return str(wait_for(lambda: _etcd_leader(lab), "etcd to have a leader"))


def _etcd_leader(lab: Lab) -> str | None:
    for member in MEMBERS:
        files = lab.node_dir(member) / "tls"
        given = {"endpoints": f"https://{ADDRESSES[member]}:{ETCD_CLIENT_PORT}", "cacert": files / "ca.crt"}
        given |= {"cert": files / "node.crt", "key": files / "node.key", "write-out": "json"}
        words = ["etcdctl", *(f"--{name}={value}" for name, value in given.items()), "endpoint", "status"]
        argv, environment = lab.command(member, words)
        environment["ETCDCTL_API"] = "3"
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 0:
            status = json.loads(done.stdout)[0]["Status"]
            if status.get("leader") == status["header"]["member_id"]:
                return member
    return None


@pytest.mark.parametrize(
    ("other", "one_way"),
    [
        ("peer", "in"),
        ("peer", "out"),
        ("w", "in"),
        ("w", "out"),
        ("client", "in"),
        pytest.param("client", "out", marks=pytest.mark.soak),
    ],
)
def test_one_way_cut(lab: Lab, other: str, one_way: str) -> None:
    """Of the primary, from the standby, the witness or the clients."""
    primary = primary_of(lab)
    cut_off = other_than(primary) if other == "peer" else other
    with Watched(lab) as watched:
        watched.wait_for_more(20)
        lab.cut(primary, cut_off, inward=one_way == "in", outward=one_way == "out")
        if other == "client":  # nobody notices but the clients, and nothing can be done about it
            time.sleep(2 * TTL_S)
        else:
            watched.wait_for_more(30)
        lab.join(primary, cut_off)
        watched.wait_for_more(20)
        heal(lab)
        watched.wait_for_more(5)
    watched.check(takeovers=2)


def test_primary_is_cut_from_etcd_only(lab: Lab) -> None:
    """It goes on as long as the standby agrees."""
    primary = primary_of(lab)
    with Watched(lab) as watched:
        watched.wait_for_more(20)
        for member in MEMBERS:
            if member != primary:
                lab.cut_etcd(primary, member)
        watched.wait_for_more(50)
        for member in MEMBERS:
            if member != primary:
                lab.join(primary, f"etcd_{member}")
        watched.wait_for_more(10)
        heal(lab)
    watched.check(takeovers=2)


def test_etcd_leader_hangs_for_ten_seconds(lab: Lab) -> None:
    member = etcd_leader(lab)
    with Watched(lab) as watched:
        watched.wait_for_more(20)
        lab.kill(member, "etcd", signal.SIGSTOP)
        time.sleep(10)
        lab.kill(member, "etcd", signal.SIGCONT)
        watched.wait_for_more(30)
        heal(lab)
    watched.check(takeovers=2)


def test_witness_is_lost_and_comes_back(lab: Lab) -> None:
    primary = primary_of(lab)
    with Watched(lab) as watched:
        watched.wait_for_more(20)
        lab.power_off("w")
        watched.wait_for_more(50)
        lab.power_on("w")
        watched.wait_for_more(20)
        heal(lab)
    watched.check(takeovers=2)
    assert primary_of(lab) in (primary, other_than(primary))


@contextmanager
def reading_alone(lab: Lab, node: str) -> Iterator[None]:
    """The node's gateway runs with `isolated_reads`."""
    before = lab.config(node).read_text()
    lab.config(node).write_text(before.replace("[dicom]\n", "[dicom]\nisolated_reads = true\n"))
    try:
        lab.kill(node, "gateway")
        yield
    finally:
        lab.config(node).write_text(before)
        lab.kill(node, "gateway")


def test_two_members_of_etcd_are_lost_and_then_the_peer(lab: Lab) -> None:
    """While both nodes see each other they go on. Alone and without etcd the primary refuses, and says so."""
    primary = primary_of(lab)
    standby = other_than(primary)
    with Watched(lab) as watched:
        watched.wait_for_more(20)
        lab.power_off("w")
        lab.kill(standby, "etcd", signal.SIGSTOP)
        wait_for(lambda: not (lab.node_status(primary) or {"etcd": True})["etcd"], "etcd to have no quorum")
        time.sleep(2 * TTL_S)
        watched.wait_for_more(50)
        assert mode(lab, primary) == "PAIR"
        lab.power_off(standby)
        wait_for(lambda: mode(lab, primary) in ("READONLY", "HELD"), "the primary to hold back")
        time.sleep(TTL_S)
        count = len(watched.writer.acknowledged)
        time.sleep(TTL_S)
        assert len(watched.writer.acknowledged) == count
        own = ADDRESSES[primary]
        assert watched.writer.sent_to(own) == OUT_OF_RESOURCES
        assert not watched.writer.found(own)
        with reading_alone(lab, primary):
            wait_for(
                lambda: set(watched.writer.acknowledged) <= watched.writer.found(own), "the node to answer readers"
            )
        lab.power_on("w")
        lab.power_on(standby)
        heal(lab)
        watched.wait_for_more(10)
    watched.check(takeovers=2)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_both_are_restarted(lab: Lab, order: tuple[str, str]) -> None:
    with Watched(lab) as watched:
        watched.wait_for_more(20)
        lab.power_off("a")
        lab.power_off("b")
        lab.power_on(order[0])
        time.sleep(TTL_S)
        lab.power_on(order[1])
        watched.wait_for_more(20)
        heal(lab)
    watched.check(takeovers=2)


def test_node_freezes_past_its_lease_and_thaws(lab: Lab) -> None:
    frozen = primary_of(lab)
    with Watched(lab) as watched:
        watched.wait_for_more(20)
        lab.freeze(frozen)
        watched.wait_for_more(30)
        lab.thaw(frozen)
        watched.wait_for_more(30)
        heal(lab)
    watched.check(takeovers=1)
    assert primary_of(lab) == other_than(frozen)


def test_agent_dies_between_etcd_and_the_address(lab: Lab) -> None:
    """The node has the lease, but nothing is up yet: its agent's successor finishes it."""
    primary = primary_of(lab)
    successor = other_than(primary)
    (lab.node_dir(successor) / "run" / f"{successor}-ha.crash").write_text("acquired")
    before = pid_of(lab, successor, "ha")
    with Watched(lab) as watched:
        watched.wait_for_more(10)
        lab.kill(primary, "gateway", signal.SIGSTOP)
        wait_for(lambda: pid_of(lab, successor, "ha") not in (before, None), "the agent to have died and come back")
        lab.kill(primary, "gateway", signal.SIGCONT)
        watched.wait_for_more(30)
        heal(lab)
    watched.check(takeovers=2)


def test_agent_is_stopped_properly(lab: Lab) -> None:
    """SIGTERM, as systemd does it: address and lease are given back. The other node has them after a second, unless the
    agent, which is started again, is back before."""
    primary = primary_of(lab)
    with Watched(lab) as watched:
        watched.wait_for_more(10)
        agent, log = pid_of(lab, primary, "ha"), lab.node_dir(primary) / "log" / "ha.log"
        before = len(log.read_text())
        lab.kill(primary, "ha", signal.SIGTERM)
        wait_for(lambda: pid_of(lab, primary, "ha") not in (agent, None), "the agent to be started again")
        watched.wait_for_more(20)
        heal(lab)
    watched.check(takeovers=2)
    ending, _, _ = log.read_text()[before:].partition('"ha.started"')
    assert '"lease.not_revoked"' not in ending
    assert '"site.down"' in ending
    assert '"smbd.stopped"' in ending


@pytest.mark.timeout(600)
def test_twenty_switchovers_under_load(lab: Lab) -> None:
    with Watched(lab) as watched:
        for _ in range(20):
            before = primary_of(lab)
            code, output = tandem(lab, before, "switchover")
            assert code == 0, output
            watched.wait_for_more(5)
            wait_for(lab.in_sync, "the pair to be in sync", 60)
        heal(lab)
    watched.check(takeovers=20)
    history = asked(lab, "a", "history")[1]["history"]
    assert [row["by"] for row in history][-20:] == ["switchover"] * 20


@pytest.fixture
def with_other_processes(lab: Lab) -> Iterator[Lab]:
    """For a test that starts a node's processes otherwise; afterwards they are as they were."""
    kept = {node: (lab.node_dir(node) / "processes.json").read_text() for node in ("a", "b")}
    yield lab
    for node, text in kept.items():
        path = lab.node_dir(node) / "processes.json"
        if path.read_text() != text:
            path.write_text(text)
            lab.power_off(node)
            lab.power_on(node)
    heal(lab)


def restart_with(lab: Lab, node: str, *prefix: str) -> None:
    """Restart a node whose gateway and agent are started through a command."""
    path = lab.node_dir(node) / "processes.json"
    commands = json.loads(path.read_text())
    for name in ("gateway", "ha"):
        commands[name] = [*prefix, *commands[name]]
    path.write_text(json.dumps(commands))
    lab.power_off(node)
    lab.power_on(node)
    wait_for(lambda: lab.in_sync() and healed(lab), "the pair to be in sync and complete", 120)


@pytest.mark.parametrize("hours", [pytest.param("+1h", marks=pytest.mark.soak), "-1h"])
def test_wall_clock_of_a_node_is_an_hour_off(with_other_processes: Lab, hours: str) -> None:
    """Nothing rests on it: as primary, as standby, and across a takeover in both directions."""
    lab = with_other_processes
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    assert library, "libfaketime is missing; tools/setup installs it"
    restart_with(lab, "a", "env", f"LD_PRELOAD={library}", f"FAKETIME={hours}", "FAKETIME_DONT_FAKE_MONOTONIC=1")
    with Watched(lab) as watched:
        watched.wait_for_more(20)
        for _ in range(2):
            lab.power_off(primary_of(lab))
            watched.wait_for_more(20)
            heal(lab)
            watched.wait_for_more(10)
    watched.check(takeovers=4)


def test_rolling_upgrade_under_load(with_other_processes: Lab, tmp_path: Path) -> None:
    """Standby first, switchover, then the other; the new version speaks a later minor of the wire."""
    lab = with_other_processes
    newer = tmp_path / "newer"
    for package in ("conf", "gateway", "storage", "ha", "tools"):
        shutil.copytree(ROOT / package, newer / package, ignore=shutil.ignore_patterns("__pycache__"))
    version, wire = newer / "conf" / "__init__.py", newer / "storage" / "replication" / "routes.py"
    version.write_text(version.read_text() + '\nVERSION = "99.1"\n')
    assert "WIRE: Final = (2, 1)" in wire.read_text()
    wire.write_text(wire.read_text().replace("WIRE: Final = (2, 1)", "WIRE: Final = (2, 2)"))
    first = other_than(primary_of(lab))
    with Watched(lab) as watched:
        watched.wait_for_more(10)
        restart_with(lab, first, "env", f"PYTHONPATH={newer}")
        status = lab.node_status(other_than(first))
        assert status
        assert status["peer_version"] == "99.1"
        watched.wait_for_more(10)
        code, output = tandem(lab, other_than(first), "switchover")
        assert code == 0, output
        watched.wait_for_more(10)
        wait_for(lab.in_sync, "the pair to be in sync", 120)
        restart_with(lab, other_than(first), "env", f"PYTHONPATH={newer}")
        watched.wait_for_more(10)
        heal(lab)
    watched.check(takeovers=2)
