"""Disks that die, fill up and lie under a writer that never stops; deletions; crashes at named points."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_for
from tests.system.conftest import (
    NODES,
    REPLICATION_PORT,
    SYNC_S,
    heal,
    healed,
    mend_disks,
    other_than,
    pid_of,
    primary_of,
    renew,
    volume_states,
)
from tests.system.writer import Writer
from tools.lab.pair import Lab


def verified(lab: Lab) -> None:
    """The nodes compare themselves, entry by entry and copy by copy."""
    result = lab.order(primary_of(lab), "verify")
    assert result["same"], result["differences"]


@pytest.mark.parametrize("role", ["primary", "backup"])
def test_disk_dies_under_load_and_is_replaced(lab: Lab, role: str) -> None:
    node = primary_of(lab) if role == "primary" else other_than(primary_of(lab))
    with Writer(lab) as writer:
        writer.wait_for_more(40)
        lab.disks(node).fail(1)
        writer.wait_for_more(40)
        wait_for(
            lambda: any(state.startswith("failed") for state in volume_states(lab, node)), "the disk to be noticed"
        )
        wait_for(lambda: healed(lab), "its copies to be made again on the other disk", SYNC_S)
        lab.replace_disk(node, 1)
        writer.wait_for_more(20)
    heal(lab)
    writer.check()
    verified(lab)


def test_a_different_disk_dies_on_each_node(lab: Lab, tmp_path: Path) -> None:
    """All that only one of them has left is still read, through either node; the rest is unavailable, not unknown."""
    renew(lab)
    with Writer(lab) as writer, Writer(lab) as other:  # two studies, so that both disks are used
        writer.wait_for_more(40)
        other.wait_for_more(40)
    heal(lab)
    primary = primary_of(lab)
    lab.disks(primary).fail(1)
    lab.disks(other_than(primary)).fail(2)
    outcomes = set()
    for number, uid in enumerate([*list(writer.acknowledged)[:8], *list(other.acknowledged)[:8]]):
        outcomes.add(_get(lab, NODES[number % 2], uid, tmp_path / f"{number}.dcm"))
    assert outcomes <= {"read", "unavailable"}
    assert "read" in outcomes
    # The modality sends again what both dead disks held; those bytes become the copies.
    for node in NODES:
        wait_for(
            lambda node=node: any(state.startswith("failed") for state in volume_states(lab, node)), "both noticed"
        )
    mend_disks(lab)
    for one in (writer, other):
        one.send_again()
    wait_for(lambda: healed(lab), "the copies", SYNC_S)
    for one in (writer, other):
        one.check()
    verified(lab)


def _get(lab: Lab, node: str, uid: str, output: Path) -> str:
    argv, environment = lab.command(node, [*_tandem(), "get", uid, "--output", str(output)])
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        assert output.read_bytes()[128:132] == b"DICM"
        return "read"
    assert "temporarily unavailable" in done.stderr, done.stderr
    return "unavailable"


def _tandem() -> list[str]:
    return [sys.executable, "-m", "tools"]


def test_disk_full_on_the_backup_only(lab: Lab) -> None:
    backup = other_than(primary_of(lab))
    with Writer(lab) as writer:
        writer.wait_for_more(20)
        for number in (1, 2):
            lab.disks(backup).fill(number)
        wait_for(lambda: writer.answers.get(0xA700, 0) > 3, "senders to hear that there is no room")
        for number in (1, 2):
            lab.disks(backup).empty(number)
        writer.wait_for_more(20)
    heal(lab)
    writer.check()


def test_flipped_bits_are_found_and_mended(lab: Lab) -> None:
    with Writer(lab) as writer:
        writer.wait_for_more(30)
    heal(lab)
    uids = list(writer.acknowledged)
    lab.disks("a").flip_bit(uids[0])
    lab.disks("b").flip_bit(uids[1])
    assert writer.missing_on("a") == [uids[0]]
    for node in NODES:
        result = lab.order(node, "scrub", study="")
        assert result["bad"] == 1
    wait_for(lambda: healed(lab), "the copies to be mended")
    writer.check()
    verified(lab)
    for node, uid in (("a", uids[0]), ("b", uids[1])):
        kept = lab.order(node, "quarantine-list")["objects"]
        assert any(one.get("sop_instance") == uid and one["reason"] == "damaged" for one in kept)


def test_files_changed_by_hand_are_noticed(lab: Lab) -> None:
    with Writer(lab) as writer:
        writer.wait_for_more(10)
    heal(lab)
    node = primary_of(lab)
    [first, *_] = writer.acknowledged
    path = writer.files_on(node)[first]
    stranger = path.with_name("stranger.dcm")
    shutil.copy(path, stranger)
    path.unlink()
    result = lab.order(node, "scrub", study="")
    assert result["bad"] == 1
    assert result["strangers"] >= 1
    assert not stranger.exists()
    wait_for(lambda: healed(lab), "the deleted file to be back")
    writer.check()


def test_deleted_while_the_peer_is_down(lab: Lab) -> None:
    with Writer(lab) as writer:
        writer.wait_for_more(20)
    heal(lab)
    primary = primary_of(lab)
    lab.power_off(other_than(primary))
    wait_for(lambda: (lab.node_status(primary) or {}).get("mode") == "SOLO", "the primary to go on alone")
    study = writer.study
    gone = list(writer.acknowledged)[:5]
    for uid in gone:
        result = lab.order(primary, "delete", study=study, sop_instance=uid, reason="test", by="test")
        assert result["deleted"] == 1
        del writer.acknowledged[uid]
    heal(lab)
    writer.check()
    for node in NODES:
        wait_for(lambda node=node: not set(gone) & set(writer.files_on(node)), f"the files to be gone from {node}")
    assert not set(gone) & writer.found()
    verified(lab)


def test_an_older_disk_image_is_put_back(lab: Lab) -> None:
    with Writer(lab) as writer:
        writer.wait_for_more(20)
        backup = other_than(primary_of(lab))
        lab.power_off(backup)
        images = lab.node_dir(backup) / "images"
        before = images.with_name("images-before")
        subprocess.run(["cp", "-r", "--sparse=always", str(images), str(before)], check=True)
        lab.power_on(backup)
        wait_for(lab.in_sync, "the pair to be in sync", SYNC_S)
        writer.wait_for_more(20)
        lab.power_off(backup)
        shutil.rmtree(images)
        before.rename(images)
        lab.power_on(backup)
        writer.wait_for_more(20)
    heal(lab)
    assert primary_of(lab) == other_than(backup)
    writer.check()
    verified(lab)


def test_damaged_catalogue_is_made_anew_from_the_peer(lab: Lab) -> None:
    """The backup begins anew as a stranger and takes over the good files that lie on its disks."""
    with Writer(lab) as writer:
        writer.wait_for_more(30)
    heal(lab)
    backup = other_than(primary_of(lab))
    lab.power_off(backup)
    lab.disks(backup).mount()
    (lab.node_dir(backup) / "state" / "catalogue" / "data.mdb").write_bytes(b"not a database" * 1000)
    lab.disks(backup).unmount()
    lab.power_on(backup)
    heal(lab)
    writer.check()
    verified(lab)
    kept = lab.order(backup, "quarantine-list")["objects"]
    assert not [one for one in kept if one["reason"] == "not in the catalogue" and one.get("sop_instance")]
    assert "catalogue.damaged" in (lab.node_dir(backup) / "log" / "gateway.log").read_text()


def test_acknowledgements_are_lost_on_the_way_back(lab: Lab) -> None:
    """Requests pass, answers don't: what the sender heard Success for is on both nodes all the same."""
    primary = primary_of(lab)
    with Writer(lab) as writer:
        writer.wait_for_more(20)
        lab.cut_one_way(other_than(primary), REPLICATION_PORT)
        writer.wait_for_more(20)
        lab.join_port(other_than(primary), REPLICATION_PORT)
        writer.wait_for_more(20)
    heal(lab)
    writer.check()


QUICK = ["primary:journal.before_commit", "standby:journal.after_commit", "primary:primary.before_answer"]
SLOW = [
    *("primary:incoming.before_fsync", "primary:incoming.after_fsync", "primary:journal.after_commit"),
    *("primary:journal.after_publish", "primary:primary.before_prepare", "standby:incoming.before_fsync"),
    *("standby:incoming.after_fsync", "standby:journal.before_commit", "standby:journal.after_publish"),
    "standby:standby.before_ack",
]


@pytest.mark.parametrize("where", [*QUICK, *(pytest.param(point, marks=pytest.mark.soak) for point in SLOW)])
def test_killed_at_a_named_point(lab: Lab, where: str) -> None:
    role, _, point = where.partition(":")
    node = primary_of(lab) if role == "primary" else other_than(primary_of(lab))
    before = lab.pid(node, "gateway")
    with Writer(lab) as writer:
        writer.wait_for_more(10)
        lab.order(node, "crash", point=point, count=7)
        wait_for(lambda: pid_of(lab, node) not in (before, None), "the gateway to be killed and started again")
        writer.wait_for_more(20)
    heal(lab)
    writer.check()
    verified(lab)


def test_killed_in_mid_heal(lab: Lab) -> None:
    node = other_than(primary_of(lab))
    with Writer(lab) as writer:
        writer.wait_for_more(60)
        before = lab.pid(node, "gateway")
        lab.order(node, "crash", point="heal.before_move")
        lab.disks(node).fail(1)
        wait_for(lambda: pid_of(lab, node) not in (before, None), "the gateway to be killed and started again")
        writer.wait_for_more(10)
    lab.replace_disk(node, 1)
    heal(lab)
    writer.check()
    verified(lab)


def test_quarantined_object_is_restored(lab: Lab) -> None:
    with Writer(lab) as writer:
        writer.wait_for_more(5)
    heal(lab)
    primary = primary_of(lab)
    uid = next(iter(writer.acknowledged))
    lab.order(primary, "delete", study=writer.study, sop_instance=uid, reason="by mistake", by="test")
    assert uid not in writer.found()
    kept: list[dict[str, Any]] = wait_for(
        lambda: [one for one in lab.order(primary, "quarantine-list")["objects"] if one.get("sop_instance") == uid],
        "the object in quarantine",
    )
    argv, environment = lab.command(primary, [*_tandem(), "quarantine", "restore", kept[0]["id"]])
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    writer.check()
    listed = subprocess.run(
        lab.command(primary, [*_tandem(), "volume", "list", "--json"])[0],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(listed.stdout)["volumes"]) == 2
