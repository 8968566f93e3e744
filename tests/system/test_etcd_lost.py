"""etcd begins anew, or is set back to a backup: nobody leads by what it says then, and one command mends it."""

import shutil
import time
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.system.conftest import TTL_S, heal, other_than, primary_of
from tests.system.test_switchover import asked, tandem
from tests.system.writer import Writer
from tools.lab.network import MEMBERS, NODES
from tools.lab.pair import Lab


def all_off(lab: Lab) -> None:
    for node in MEMBERS:
        lab.power_off(node)


def all_on(lab: Lab) -> None:
    for node in MEMBERS:
        lab.power_on(node)


def data(lab: Lab, member: str) -> Path:
    return lab.node_dir(member) / "etcd"


def force(lab: Lab, node: str) -> str | None:
    """The node that took it: the other one, where that one's log is longer."""
    code, said = tandem(lab, node, "failover", "--force", "--yes")
    if code and "run this there" in said:
        node = other_than(node)
        code, said = tandem(lab, node, "failover", "--force", "--yes")
    return node if code == 0 else None


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("what", "forced"), [("lost", "primary"), ("restored", "standby")])
def test_etcd_that_knows_less_than_the_nodes(lab: Lab, tmp_path: Path, what: str, forced: str) -> None:
    if what == "restored":
        all_off(lab)
        for member in MEMBERS:
            shutil.copytree(data(lab, member), tmp_path / member)
        all_on(lab)
        heal(lab)
        assert tandem(lab, primary_of(lab), "switchover")[0] == 0  # an epoch that the backup doesn't know
        heal(lab)
    primary = primary_of(lab)
    with Writer(lab) as writer:
        writer.wait_for_more(20)
        all_off(lab)
        for member in MEMBERS:
            shutil.rmtree(data(lab, member))
            if what == "restored":
                shutil.copytree(tmp_path / member, data(lab, member))
            else:
                data(lab, member).mkdir()
            data(lab, member).chmod(0o700)
        all_on(lab)
        wait_for(lambda: all((lab.node_status(node) or {}).get("etcd") for node in NODES), "etcd to answer", 120)
        for _ in range(int(3 * TTL_S / 0.2)):
            assert lab.primary() is None
            time.sleep(0.2)
        node = primary if forced == "primary" else other_than(primary)
        code, result = asked(lab, node, "why")
        assert code == 4
        assert any(not row["ok"] for row in result["conditions"])
        node = wait_for(lambda: force(lab, node), "the force to be applied")
        wait_for(lambda: lab.primary() == node, "it to serve", 120)
        heal(lab)
        writer.wait_for_more(20)
    heal(lab)
    writer.check()
