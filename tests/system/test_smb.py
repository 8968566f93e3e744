"""The share over SMB: users known to both nodes, what was flushed survives any fault, nothing is shown too early."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from smbprotocol.exceptions import SMBException

from tests.conftest import wait_for
from tests.system.conftest import SYNC_S, mend_disks, other_than, primary_of, volume_states
from tests.system.smb import PASSWORD, USER, Session, SmbWriter, have_user, run
from tests.system.test_share import mounted, same_on_both
from tools.lab.network import inside
from tools.lab.pair import Lab


def known_on(lab: Lab, node: str) -> dict[str, str]:
    """What smbd of a node knows: NT hash by user."""
    lines = (lab.node_dir(node) / "share" / "private" / "smbpasswd").read_text().splitlines()
    return {line.split(":")[0]: line.split(":")[3] for line in lines}


def lets_in(user: str, password: str, share: str = "files") -> bool:
    try:
        with inside("client"), Session(share, user, password) as session:
            session.names()
    except (SMBException, OSError, ValueError):
        return False
    return True


def test_users_are_known_to_both_nodes(lab: Lab) -> None:
    primary = primary_of(lab)
    standby = other_than(primary)
    mounted(lab, primary, writable=True)
    words = ("tandem", "share", "user")
    done = run(lab, standby, *words, "add", "anna", given="one\none\n")
    assert done.returncode and f"do it on node {primary}" in done.stderr
    done = run(lab, primary, *words, "add", "anna", given="one\ntwo\n")
    assert done.returncode and "differ" in done.stderr
    done = run(lab, primary, *words, "add", "Anna", given="one\none\n")
    assert done.returncode and "small letters" in done.stderr
    done = run(lab, primary, *words, "add", "root", given="one\none\n")
    assert done.returncode and "account of the system" in done.stderr
    done = run(lab, primary, *words, "add", "anna", given="one\none\n")
    assert done.returncode == 0, done.stderr
    assert lets_in("anna", "one") and lets_in("ANNA", "one")
    assert not lets_in("anna", "two") and not lets_in("otto", "one") and not lets_in("nobody", "")
    wait_for(lambda: known_on(lab, standby) == known_on(lab, primary), "the standby to know them")
    done = run(lab, primary, *words, "add", "anna", given="two\ntwo\n")
    assert done.returncode and "there is a user anna" in done.stderr
    done = run(lab, primary, *words, "password", "anna", given="two\ntwo\n")
    assert done.returncode == 0, done.stderr
    assert lets_in("anna", "two") and not lets_in("anna", "one")
    switch_over(lab)
    wait_for(lambda: lets_in("anna", "two"), "the other node to let her in")
    assert not lets_in("anna", "one")
    with inside("client"), Session("files", "anna", "two") as session:
        session.names()
        done = run(lab, standby, *words, "remove", "anna")
        assert done.returncode == 0, done.stderr
        wait_for(lambda: not works(session), "her connection to be ended")
    assert not lets_in("anna", "two")
    assert "anna" not in run(lab, primary, *words, "list").stdout


def switch_over(lab: Lab) -> None:
    before = primary_of(lab)
    done = run(lab, before, "tandem", "switchover")
    assert done.returncode == 0, done.stderr
    wait_for(lambda: primary_of(lab) != before and lab.in_sync(), "the switchover", SYNC_S)


def works(session: Session) -> bool:
    try:
        session.names()
    except Exception:
        return False
    return True


def test_names_attributes_and_streams_as_windows_has_them(lab: Lab) -> None:
    """And the same after a switchover."""
    primary = primary_of(lab)
    have_user(lab, primary)
    mounted(lab, primary, writable=True)
    data = os.urandom(3_000_000)
    with inside("client"), Session() as session:
        session.mkdir(r"Windows\Ünter")
        session.write(r"Windows\Ünter\Image.DCM", data)
        session.write(r"Windows\Ünter\Image.DCM:Zone.Identifier", b"[ZoneTransfer]")
        assert session.read(r"WINDOWS\üNTER\image.dcm") == data
        with session.open(r"windows\ünter\IMAGE.dcm", "r+b") as file:
            file.write(b"12345")
        assert session.names("Windows\\Ünter") == {"Image.DCM"}
        before = session.stat(r"Windows\Ünter\Image.DCM")
    switch_over(lab)
    wait_for(lambda: lets_in(USER, PASSWORD), "the other node to let us in")
    with inside("client"), Session() as session:
        assert session.read(r"windows\Ünter\image.dcm") == b"12345" + data[5:]
        assert session.read(r"windows\Ünter\image.dcm:Zone.Identifier") == b"[ZoneTransfer]"
        after = session.stat(r"Windows\Ünter\Image.DCM")
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, len(data))
    assert (after.st_file_attributes, after.st_ctime_ns) == (before.st_file_attributes, before.st_ctime_ns)


def test_an_empty_folder_is_never_shown(lab: Lab) -> None:
    """The process that mounts the files hangs before it does: smbd lets nobody in, and what lies below stays empty."""
    primary = primary_of(lab)
    have_user(lab, primary)
    mounted(lab, primary, writable=True)
    below = Path(f"/proc/{lab.pid(primary, 'gateway')}/root{lab.files(primary)}")
    supervisor = _supervisor_of(lab, primary)
    with inside("client"), Session() as session:
        session.write("there", b"1")
    os.kill(supervisor, signal.SIGSTOP)  # starts nothing again
    try:
        lab.kill(primary, "mount")
        wait_for(lambda: not lets_in(USER, PASSWORD), "smbd to let nobody in")
        inside_of = ["nsenter", "--mount", "--target", str(lab.pid(primary, "gateway"))]
        subprocess.run([*inside_of, "umount", "-l", str(lab.files(primary))], check=True)
        assert not list(below.iterdir())
        assert not lets_in(USER, PASSWORD)
        assert not list(below.iterdir())
    finally:
        os.kill(supervisor, signal.SIGCONT)
    mounted(lab, primary_of(lab), writable=True)
    wait_for(lambda: lets_in(USER, PASSWORD), "smbd to let us in again", SYNC_S)
    with inside("client"), Session() as session:
        assert session.read("there") == b"1"


def _supervisor_of(lab: Lab, node: str) -> int:
    text = Path(f"/proc/{lab.pid(node, 'gateway')}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("PPid:")))


def test_a_client_sees_nothing_but_a_pause_at_many_switchovers(lab: Lab) -> None:
    primary = primary_of(lab)
    have_user(lab, primary)
    mounted(lab, primary, writable=True)
    writer = SmbWriter("often", 7)
    with writer.running():
        for _ in range(5):
            switch_over(lab)
            writer.wait_for_more(3)
            time.sleep(0.5)
    writer.check()
    same_on_both(lab)


@pytest.mark.parametrize("fault", ["power", "freeze", "mount", "smbd", "switchover", "disk"])
def test_what_was_flushed_over_smb_survives(lab: Lab, fault: str) -> None:
    primary = primary_of(lab)
    have_user(lab, primary)
    mounted(lab, primary, writable=True)
    writer = SmbWriter(fault, len(fault))
    with writer.running():
        cause(lab, primary, fault)
        writer.wait_for_more()
    print(f"{fault}: {len(writer.files)} files, {writer.outage_s:.1f} s at most between two")
    if fault in ("power", "freeze"):
        assert primary_of(lab) != primary
    wait_for(lambda: lets_in(USER, PASSWORD), "smbd to let us in", SYNC_S)
    writer.check()
    with contextlib.suppress(Exception):
        lab.power_on(primary)
    lab.thaw(primary)
    wait_for(lab.in_sync, "the pair to be in sync", SYNC_S)
    if fault == "disk":
        wait_for(lambda: any(state != "online" for state in volume_states(lab, primary)), "it to be noticed", SYNC_S)
        mend_disks(lab)
        wait_for(lambda: lets_in(USER, PASSWORD), "smbd to let us in", SYNC_S)
    else:
        same_on_both(lab)
    writer.check()


def cause(lab: Lab, node: str, fault: str) -> None:
    match fault:
        case "power":
            lab.power_off(node)
        case "freeze":
            lab.freeze(node)
        case "switchover":
            switch_over(lab)
        case "disk":
            lab.disks(node).fail(1)
        case _:
            lab.kill(node, fault)
