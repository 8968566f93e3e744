"""The share of a pair, mounted on both nodes: what is flushed is on both, whatever happens to one of them."""

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.system.conftest import SYNC_S, other_than, primary_of
from tools.lab.network import LabError
from tools.lab.pair import Lab

BLOCK = 1 << 20
RECORD = 512


def mounted(lab: Lab, node: str, *, writable: bool = False) -> Path:
    """Where the share of a node is seen from here, once it is."""

    def found() -> Path | None:
        with contextlib.suppress(LabError, OSError):
            point = lab.files_from_outside(node)
            state = Path(f"/proc/{lab.pid(node, 'mount')}/mounts").read_text()
            kinds = [line.split()[3].split(",")[0] for line in state.splitlines() if line.split()[1].endswith("/files")]
            if kinds == (["rw"] if writable else kinds) and kinds and point.is_dir():
                return point
        return None

    path: Path = wait_for(found, f"the share on {node}")
    return path


def copies(lab: Lab, node: str) -> dict[str, set[bytes]]:
    """All bytes of the share as they lie on a node's disks, by inode number: one made again after a disk was lost has
    another name, and an old one is removed later. Not those that are empty: one may have been about to be made when
    the writer was lost, and never have come to be."""
    found: dict[str, set[bytes]] = {}
    for volume in lab.volumes(node):
        for path in (volume / "files").rglob("*"):
            if path.is_file() and (data := path.read_bytes()):
                found.setdefault(path.name.partition(".")[0], set()).add(data)
    return found


def differing(lab: Lab) -> list[str]:
    first, second = copies(lab, "a"), copies(lab, "b")
    return [one for one in first.keys() | second.keys() if not first.get(one, set()) & second.get(one, set())]


def same_on_both(lab: Lab) -> None:
    wait_for(lab.files_complete, "every file to be on both nodes", SYNC_S)
    try:
        wait_for(lambda: not differing(lab), "the copies to be the same", SYNC_S)
    except AssertionError as error:
        raise AssertionError(f"{error}: {differing(lab)}") from error


def test_both_nodes_show_and_hold_the_same(lab: Lab) -> None:
    primary = primary_of(lab)
    standby = other_than(primary)
    point = mounted(lab, primary, writable=True)
    folder = point / "same"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.dcm").write_bytes(os.urandom(135_000))
    (folder / "long").write_bytes(os.urandom(5 * BLOCK + 17))
    os.rename(folder / "0.dcm", folder / "renamed.dcm")
    (folder / "1.dcm").unlink()
    same_on_both(lab)
    other = mounted(lab, standby) / "same"
    wait_for(lambda: sorted(os.listdir(other)) == sorted(os.listdir(folder)), "the standby to show it")
    for name in os.listdir(folder):
        assert (other / name).read_bytes() == (folder / name).read_bytes()
        mine, theirs = (folder / name).stat(), (other / name).stat()
        assert [mine.st_ino, mine.st_mtime_ns, mine.st_blocks] == [theirs.st_ino, theirs.st_mtime_ns, theirs.st_blocks]
    with pytest.raises(OSError, match="Read-only"):
        (other / "new").write_bytes(b"x")


def test_what_is_looked_at_on_the_standby_while_it_is_written_to(lab: Lab) -> None:
    """Opening and closing it there changes nothing, also if it is removed meanwhile: the mount stays."""
    primary = primary_of(lab)
    standby = other_than(primary)
    folder = mounted(lab, primary, writable=True) / "looked-at"
    folder.mkdir()
    pid = lab.pid(standby, "mount")
    log = lab.node_dir(standby) / "log" / "mount.log"
    with (folder / "file").open("wb", buffering=0) as file:
        file.write(b"one")
        os.fsync(file.fileno())
        seen = mounted(lab, standby) / "looked-at" / "file"
        wait_for(lambda: seen.exists() and seen.stat().st_size == 3, "the standby to show it")
        before = log.read_text().count("share.mounted")
        assert seen.read_bytes() == b"one"
        with seen.open("rb") as held:
            (folder / "file").unlink()
            wait_for(lambda: not seen.exists(), "the standby to show that it is removed")
            held.close()
    (folder / "another").write_bytes(b"two")
    other = seen.with_name("another")
    wait_for(lambda: other.exists() and other.read_bytes() == b"two", "the standby to show another")
    assert (lab.pid(standby, "mount"), log.read_text().count("share.mounted")) == (pid, before)


def test_a_node_that_was_away_takes_what_it_lacks(lab: Lab) -> None:
    """A long file of which one block has changed, a new one, one that is no more."""
    primary = primary_of(lab)
    standby = other_than(primary)
    folder = mounted(lab, primary, writable=True) / "away"
    folder.mkdir()
    (folder / "long").write_bytes(os.urandom(8 * BLOCK))
    (folder / "removed").write_bytes(b"removed")
    same_on_both(lab)
    lab.power_off(standby)
    wait_for(lambda: (lab.node_status(primary) or {}).get("mode") == "SOLO", "the primary to be alone")
    with (folder / "long").open("r+b") as file:
        file.seek(3 * BLOCK + 5)
        file.write(b"changed")
    (folder / "new").write_bytes(os.urandom(300_000))
    (folder / "removed").unlink()
    status = lab.node_status(primary)
    assert status and status["files"]["single_copy"] == 2
    lab.power_on(standby)
    wait_for(lab.in_sync, "the pair to be in sync", SYNC_S)
    same_on_both(lab)


class Program:
    """Writes whole files, and records at random places of one that stays open, as a database does; knows what it
    flushed."""

    def __init__(self, folder: Callable[[], Path], seed: int) -> None:
        self._folder, self._rng = folder, random.Random(seed)
        self.files: dict[str, bytes] = {}
        self.records: dict[int, bytes] = {}  # of the database: what was flushed
        self.maybe: dict[int, set[bytes]] = {}  # what was written and not flushed
        self.flushed = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    @contextlib.contextmanager
    def running(self) -> Iterator["Program"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join(120)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError, AssertionError):
                self._work(self._folder())
            time.sleep(0.1)

    def _work(self, folder: Path) -> None:
        """Until something fails: the handle is lost at a failover, as it is for a client."""
        with (folder / "database").open("r+b" if (folder / "database").exists() else "w+b", buffering=0) as database:
            while not self._stop.is_set():
                name = f"{self.flushed}-{self._rng.randrange(1 << 30)}.dcm"
                data = self._rng.randbytes(self._rng.choice((10, 9_000, 135_000)))
                with (folder / f".{name}").open("wb") as file:
                    file.write(data)
                os.rename(folder / f".{name}", folder / name)
                self.files[name] = data
                for _ in range(3):
                    at, record = self._rng.randrange(200), self._rng.randbytes(RECORD)
                    self.maybe.setdefault(at, set()).add(record)
                    os.pwrite(database.fileno(), record, at * RECORD)
                os.fsync(database.fileno())
                database_now = os.pread(database.fileno(), 200 * RECORD, 0)
                for at in self.maybe:
                    self.records[at] = database_now[at * RECORD : (at + 1) * RECORD]
                self.maybe.clear()
                self.flushed += 1

    def check(self, folder: Path) -> None:
        for name, data in self.files.items():
            assert (folder / name).read_bytes() == data, name
        found = (folder / "database").read_bytes()
        for at, record in self.records.items():
            here = found[at * RECORD : (at + 1) * RECORD]
            assert here == record or here in self.maybe.get(at, ()), f"record {at}"


@pytest.mark.parametrize("role", ["primary", "standby"])
def test_a_disk_is_emptied_under_load_and_replaced(lab: Lab, role: str) -> None:
    primary = primary_of(lab)
    node = primary if role == "primary" else other_than(primary)
    disk = sorted(lab.volumes(node))[0]
    folder = mounted(lab, primary, writable=True) / f"emptied-{role}"
    folder.mkdir()
    program = Program(lambda: folder, len(role))
    with program.running():
        wait_for(lambda: program.flushed > 20, "it to work")
        result = lab.order(node, "volume-drain", path=str(disk))
        assert result["files_moved"] > 0
        assert (result["left"], result["files_left"], result["why"]) == (0, 0, "")
        lab.order(node, "volume-retire", path=str(disk))
        lab.replace_disk(node, 1)
        before = program.flushed
        wait_for(lambda: program.flushed > before + 20, "it to go on")
    wait_for(lambda: [path for path in (disk / "files").rglob("*") if path.is_file()], "the new disk to be used")
    same_on_both(lab)
    for one in (primary, other_than(primary)):
        program.check(mounted(lab, one) / folder.name)


@pytest.mark.parametrize("fault", ["power", "kill mount", "kill gateway"])
def test_what_was_flushed_survives(lab: Lab, fault: str) -> None:
    primary = primary_of(lab)
    standby = other_than(primary)
    name = "survives-" + fault.replace(" ", "-")
    (mounted(lab, primary, writable=True) / name).mkdir()
    program = Program(lambda: mounted(lab, primary_of(lab), writable=True) / name, len(fault))
    with program.running():
        wait_for(lambda: program.flushed > 5, "it to work")
        if fault == "power":
            lab.power_off(primary)
        else:
            lab.kill(primary, fault.split()[1])
        before = program.flushed
        wait_for(lambda: program.flushed > before + 5, "it to go on", SYNC_S)
    if fault == "power":
        assert primary_of(lab) == standby
    program.check(mounted(lab, primary_of(lab), writable=True) / name)
    if fault == "power":
        lab.power_on(primary)
    wait_for(lab.in_sync, "the pair to be in sync", SYNC_S)
    same_on_both(lab)
    for node in (primary, standby):
        program.check(mounted(lab, node) / name)
