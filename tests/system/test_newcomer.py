"""A node that was away for long, and one with nothing in it: the state is taken, new images are protected at once, old
ones are copied after that, what was deleted stays so.
"""

import shutil
import subprocess

import pytest

from storage.replication.replica import STATE_SHARE
from tests.conftest import wait_for
from tests.system.conftest import REPLICATION_PORT, SYNC_S, VOLUMES, heal, healed, other_than, pid_of, primary_of
from tests.system.test_disks import verified
from tests.system.writer import Writer
from tools.lab.pair import STATE_AFTER, Lab


def taken(lab: Lab, node: str) -> int:
    """How often it has taken the state of the other one."""
    return (lab.node_dir(node) / "log" / "gateway.log").read_text().count('"state.taken"')


def far_behind(lab: Lab) -> int:
    """How many entries a node must lack to take the state: of a large archive, or of many files, a share of them."""
    status = lab.node_status(primary_of(lab))
    assert status
    rows = int(status["instances"]) + int(status.get("files", {}).get("count", 0))  # an old version knows no files
    return max(STATE_AFTER, rows // STATE_SHARE) + 40


@pytest.mark.parametrize("point", ["", "journal.before_become", "journal.after_become"])
def test_a_node_that_was_away_for_long_takes_the_state(lab: Lab, point: str) -> None:
    node = other_than(primary_of(lab))
    before, pid = taken(lab, node), lab.pid(node, "gateway")
    with Writer(lab) as writer:
        writer.wait_for_more(30)
        lab.cut_port(node, REPLICATION_PORT)
        writer.wait_for_more(far_behind(lab))
        if point:
            lab.order(node, "crash", point=point)
        lab.join_port(node, REPLICATION_PORT)
        if point:
            wait_for(lambda: pid_of(lab, node) not in (pid, None), "the gateway to be killed and started again")
        else:
            wait_for(lambda: taken(lab, node) > before, "the state to be taken")
        writer.wait_for_more(20)
    heal(lab)
    writer.check()
    verified(lab)


def test_an_empty_node_joins_and_takes_over(lab: Lab) -> None:
    node = other_than(primary_of(lab))
    with Writer(lab) as writer:
        writer.wait_for_more(STATE_AFTER + 20)
        lab.power_off(node)
        gone = list(writer.acknowledged)[:5]
        for uid in gone:
            lab.order(primary_of(lab), "delete", study=writer.study, sop_instance=uid, reason="test", by="test")
            del writer.acknowledged[uid]
        writer.wait_for_more(5)
    shutil.rmtree(lab.node_dir(node) / "images")
    for point in (*lab.volumes(node), lab.node_dir(node) / "state"):
        point.mkdir(exist_ok=True)
    lab.disks(node).create(VOLUMES)
    before = taken(lab, node)
    with Writer(lab) as later:
        lab.power_on(node)
        wait_for(lambda: taken(lab, node) > before, "the state to be taken")
        wait_for(lab.in_sync, "the pair to be in sync", SYNC_S)
        later.wait_for_more(20)
    wait_for(lambda: healed(lab), "every copy to be there", 3 * SYNC_S)  # without load: healing gives way to it
    lab.power_off(other_than(node))
    with Writer(lab) as last:
        last.wait_for_more(20)
    assert primary_of(lab) == node
    assert writer.found() == set(writer.acknowledged)
    heal(lab)
    for one in (writer, later, last):
        one.check()
    verified(lab)


def test_a_node_that_has_lost_its_catalogue_has_its_files_again(lab: Lab) -> None:
    """They are taken over where they lie, also by a process that begins anew in the middle: none comes from the other
    node, none goes to quarantine."""
    node = other_than(primary_of(lab))
    with Writer(lab) as writer:
        writer.wait_for_more(STATE_AFTER + 20)
    wait_for(lambda: healed(lab), "every copy to be there", SYNC_S)
    wait_for(lambda: not writer.missing_on(node), "all files to be in the tree", SYNC_S)
    for volume in lab.volumes(node):  # else the power takes what only the log has, which goes too
        subprocess.run(["sync", "-f", str(volume)], check=True)
    before = {uid: path.stat().st_ino for uid, path in writer.files_on(node).items() if uid in writer.acknowledged}
    lab.power_off(node)
    lab.disks(node).mount()
    shutil.rmtree(lab.node_dir(node) / "state" / "catalogue")
    lab.cut_port(other_than(node), REPLICATION_PORT)
    lab.power_on(node)
    wait_for(lambda: lab.node_status(node), "it to be up")
    pid = lab.pid(node, "gateway")
    lab.order(node, "crash", point="heal.before_move")
    lab.join_port(other_than(node), REPLICATION_PORT)
    wait_for(lambda: pid_of(lab, node) not in (pid, None), "the gateway to be killed and started again")
    heal(lab)
    files = writer.files_on(node)
    assert {uid: files[uid].stat().st_ino for uid in before} == before
    writer.check()
    verified(lab)
