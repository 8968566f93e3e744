"""What `tandem ha` writes for smbd, read by Samba itself; and the names of users and machine."""

import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conf.mounts import files_at, mount_at
from conf.settings import Settings, SettingsError, build
from ha.reach.samba import Samba, passwords_of, sid_of
from ha.reach.share_users import User

CHOICES: dict[str, tuple[Any, ...]] = {
    "signing": ("auto", "required"),
    "encryption": ("off", "desired", "required"),
    "acls": ("posix", "windows"),
    "recycle": (False, True),
    "audit": (False, True),
    "macos": (False, True),
    "guest": (False, True),
    "files": ("", "files"),
}


@pytest.fixture(autouse=True)
def nothing_included(monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody has in his /etc isn't tried here."""
    monkeypatch.setattr("ha.reach.samba.INCLUDED", "/nonexistent")


def settings_in(folder: Path, **share: Any) -> Settings:
    (folder / "state").mkdir(exist_ok=True)
    return build(
        {
            "storage": {"state": str(folder / "state")},
            "share": {"folder": str(folder / "share"), "mount": str(folder / "my files"), "files": "files", **share},
        },
        "test",
    )


def written(settings: Settings) -> tuple[dict[str, dict[str, str]], str]:
    """(parameters by share, what Samba complains of)"""
    samba = Samba(settings)
    samba._write_config()
    done = subprocess.run(["testparm", "-s", str(samba.config)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif "=" in line:
            key, _, value = line.strip().partition(" = ")
            section[key] = value
    said = [line for line in done.stderr.splitlines() if "nknown" in line or "ERROR" in line or "WARNING" in line]
    return found, "\n".join(said)


@pytest.mark.skipif(shutil.which("testparm") is None, reason="needs Samba")
def test_samba_understands_every_choice(tmp_path: Path) -> None:
    for values in itertools.product(*CHOICES.values()):
        share = dict(zip(CHOICES, values, strict=True))
        if share["signing"] == "required" and share["encryption"] != "desired":
            continue  # those don't touch each other
        if share["guest"] and share["encryption"] == "required":
            with pytest.raises(SettingsError, match="can't encrypt"):
                settings_in(tmp_path, **share)
            continue
        found, said = written(settings_in(tmp_path, **share))
        assert not said, share
        assert found["archive"].get("read only", "Yes") == "Yes"
        assert ("files" in found) == bool(share["files"])
        assert found["global"].get("map to guest", "Never") == ("Bad User" if share["guest"] else "Never")
        assert ("inbox" in found) == bool(share["files"])
        if share["files"]:
            assert found["inbox"]["path"] == f"{found['files']['path']}/inbox"
            files = found["files"]
            assert (files["read only"], files.get("guest ok", "No")) == ("No", "No")
            modules = files["vfs objects"].split()
            assert ("recycle" in modules, "full_audit" in modules) == (share["recycle"], share["audit"])
            assert ("acl_xattr" in modules) == (share["acls"] == "windows")


def test_nobody_is_let_in_before_the_files_are_mounted(tmp_path: Path) -> None:
    """The script that smbd asks: it looks for the very mount, and ends well only for one that may be written."""
    settings = settings_in(tmp_path)
    Samba(settings)._write_config()
    script = (tmp_path / "share" / "mounted.sh").read_text()
    mounts = tmp_path / "mounts"
    shown = str(tmp_path / "my files").replace(" ", r"\040")
    script = script.replace("/proc/self/mounts", str(mounts)).replace("-le 100", "-le 1")
    for line, well in (
        ("", False),
        (f"tandem {shown} fuse.tandem ro,nosuid 0 0\n", False),
        (f"tandem {shown}/below fuse.tandem rw,nosuid 0 0\n", False),
        (f"other {shown} ext4 rw,nosuid 0 0\n", False),
        (f"tandem {shown} fuse.tandem rw,nosuid 0 0\n", True),
    ):
        mounts.write_text("proc /proc proc rw 0 0\n" + line)
        assert subprocess.run(["sh", "-c", script, "sh", str(tmp_path / "no such folder")], timeout=30).returncode
        assert (subprocess.run(["sh", "-c", script, "sh", str(tmp_path)], timeout=30).returncode == 0) == well, line


def test_the_shares_have_different_names(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="three names"):
        settings_in(tmp_path, name="images", files="Images")


def test_both_nodes_are_the_same_machine_to_windows() -> None:
    sid = sid_of("tandem", "TANDEM")
    assert sid == sid_of("tandem", "TANDEM") != sid_of("other", "TANDEM")
    parts = sid.removeprefix("S-1-5-21-").split("-")
    assert len(parts) == 3 and all(0 <= int(part) < 1 << 32 for part in parts)


@pytest.mark.skipif(shutil.which("pdbedit") is None, reason="needs Samba")
def test_samba_reads_the_users(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    samba = Samba(settings)
    samba._write_config()
    name = "daemon"  # of every Debian machine
    passwords_of(settings).write_text(User(name, 1, "8846f7eaee8fb117ad06bdd830b7586c", 1_795_000_000).line)
    command = ["pdbedit", f"--configfile={samba.config}", "-L", "-w"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "8846F7EAEE8FB117AD06BDD830B7586C:[U          ]" in done.stdout, done.stderr


def test_what_is_mounted() -> None:
    proc = mount_at(Path("/proc"))
    assert proc is not None and proc.kind == "proc"
    assert mount_at(Path("/proc/self")) is None and files_at(Path("/proc")) is None
