"""Samba's own test-suite against the share, and the same smbd on a plain disk: what fails there, too, is smbd's own."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.system.conftest import primary_of
from tests.system.smb import PASSWORD, USER, have_user, run
from tests.system.test_share import mounted
from tools.lab.network import ADDRESSES, VIP
from tools.lab.pair import Lab

PLAIN_PORT = 1445
SUITES = (
    *("smb2.getinfo", "smb2.lock", "smb2.read", "smb2.create", "smb2.dir", "smb2.rename", "smb2.sharemode"),
    *("smb2.streams", "smb2.rw", "smb2.deny", "smb2.setinfo", "smb2.compound", "smb2.compound_find", "smb2.timestamps"),
    *("smb2.dosmode", "smb2.charset", "smb2.mkdir", "smb2.winattr", "smb2.openattr", "smb2.connect", "smb2.fileid"),
    *("smb2.delete-on-close-perms", "smb2.ioctl", "smb2.session", "smb2.tcon", "smb2.maximum_allowed", "smb2.ea"),
)
SUITE_S = 240
# Holes can't be punched or asked for through FUSE as Python has it: pyfuse3 hears nothing of fallocate(2).
HOLES = (
    *("sparse_hole_dealloc", "sparse_lock", "sparse_perms", "sparse_punch", "sparse_punch_invalid"),
    *("sparse_qar_multi", "sparse_qar_ob1"),
)


@dataclass
class Outcome:
    succeeded: set[str]
    failed: set[str]

    def __str__(self) -> str:
        return f"{len(self.succeeded)} of {len(self.succeeded) + len(self.failed)}"


def torture(lab: Lab, host: str, port: int, share: str, suite: str) -> Outcome:
    words = [
        "smbtorture",
        f"//{host}/{share}",
        f"-U{USER}%{PASSWORD}",
        f"-p{port}",
        "--option=torture:progress=no",
    ]
    argv, environment = lab.command("client", [*words, suite])
    try:
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=SUITE_S)
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode() + f"\nerror: {suite}.not-over-in-time"
    found = re.findall(r"^(success|failure|error): (\S+)", said, re.MULTILINE)
    succeeded = {name for what, name in found if what == "success"}
    return Outcome(succeeded, {name for what, name in found if what != "success"})


@pytest.fixture
def plain(lab: Lab, tmp_path: Path) -> Iterator[str]:
    """The address of an smbd with the share's settings on the primary, whose files lie on one of its disks."""
    node = primary_of(lab)
    have_user(lab, node)
    mounted(lab, node, writable=True)
    folder = lab.node_dir(node) / "plain"
    exported = sorted(lab.volumes(node))[0] / "plain"
    exported.mkdir()
    config = lab.node_dir(node) / "share" / "smb.conf"
    before = str(config.parent)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        before, folder, ignore=shutil.ignore_patterns("*.pid", "msg.*", "*.sock", "ncalrpc", "*np", "cores")
    )
    text = config.read_text().replace(before, str(folder)).replace(" glusterfs_fuse", "")
    text = re.sub(r"(smb ports = ).*", rf"\g<1>{PLAIN_PORT}", text)
    text = re.sub(r"(\[files\]\n(?:.*\n)*?    path = ).*", rf"\g<1>{exported}", text, count=1)
    text = re.sub(r"    root preexec.*\n", "", text)
    (folder / "smb.conf").write_text(text)
    shutil.chown(exported, user=text.split("force user = ")[1].split("\n")[0])
    done = run(lab, node, "smbd", "--daemon", f"--configfile={folder / 'smb.conf'}")
    assert done.returncode == 0, done.stderr
    wait_for(lambda: (folder / "smbd.pid").exists(), "the other smbd")
    yield ADDRESSES[node]
    run(lab, node, "kill", "-TERM", f"-{(folder / 'smbd.pid').read_text().strip()}")
    shutil.rmtree(exported, ignore_errors=True)


def test_nothing_fails_that_does_not_fail_on_a_plain_disk(lab: Lab, plain: str) -> None:
    worse: dict[str, set[str]] = {}
    print(f"{'suite':<32}{'share':<16}plain disk")
    for suite in SUITES:
        ours, theirs = torture(lab, VIP, 445, "files", suite), torture(lab, plain, PLAIN_PORT, "files", suite)
        print(f"{suite:<32}{ours!s:<16}{theirs}")
        assert theirs.succeeded or theirs.failed, f"{suite} did nothing"
        if failed := ours.failed - theirs.failed - {*HOLES}:
            worse[suite] = failed
            print(f"  only on the share: {', '.join(sorted(failed))}")
    assert not worse
