"""What was flushed is there after processes died and power went; what wasn't may be missing, and is never another's."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.control_client import OrderFailed, order
from tests.conftest import ROOT, Gateway, wait_for
from tests.gateway.share.conftest import Mounted
from tools.lab.disks import Disks

BLOCK = 4096
VERSIONS = 300  # written between two power cuts


def tree(point: Path) -> dict[str, bytes | str]:
    """Relative path -> bytes, or what it is."""
    found: dict[str, bytes | str] = {}
    for path in sorted(point.rglob("*")):
        name = str(path.relative_to(point))
        found[name] = "folder" if path.is_dir() else os.readlink(path) if path.is_symlink() else path.read_bytes()
    return found


def numbers(point: Path) -> dict[str, int]:
    return {str(path.relative_to(point)): path.lstat().st_ino for path in point.rglob("*")}


def again(mounted: Mounted) -> None:
    mounted.end(signal.SIGKILL)
    mounted.gateway.stop(signal.SIGKILL)
    mounted.gateway.start()
    mounted.mount()


def test_all_is_there_after_both_processes_were_killed(new_mounted: Callable[[], Mounted]) -> None:
    mounted = new_mounted()
    point = mounted.point
    (point / "folder" / "deeper").mkdir(parents=True)
    (point / "folder" / "a").write_bytes(os.urandom(300_000))
    (point / "folder" / "b").write_bytes(b"b")
    os.link(point / "folder" / "b", point / "b too")
    os.symlink("folder/a", point / "link")
    (point / "folder" / "a").rename(point / "folder" / "deeper" / "c")
    os.setxattr(point / "b too", b"user.DOSATTRIB", b"x")
    os.utime(point / "b too", ns=(5, 7))
    fd = os.open(point / "open", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"flushed", 10)
    os.fsync(fd)
    before, inodes = tree(point), numbers(point)
    again(mounted)
    assert tree(point) == before
    assert numbers(point) == inodes
    assert (point / "b too").stat().st_nlink == 2
    assert (point / "b too").stat().st_mtime_ns == 7
    assert os.getxattr(point / "b too", b"user.DOSATTRIB") == b"x"
    (point / "b too").write_bytes(b"another")
    assert (point / "folder" / "b").read_bytes() == b"another"
    with contextlib.suppress(OSError):
        os.close(fd)


def test_what_nobody_flushed_is_nobody_elses(new_mounted: Callable[[], Mounted]) -> None:
    """Inode numbers aren't given again, so bytes of a file that never came to be are never another's."""
    mounted = new_mounted()
    point = mounted.point
    fds = []
    for number in range(20):
        fd = os.open(point / f"unflushed{number}", os.O_CREAT | os.O_RDWR)
        os.pwrite(fd, b"u" * 5000, 0)
        fds.append(fd)
    again(mounted)
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    for path in point.iterdir():
        assert path.read_bytes() in (b"", b"u" * 5000)
    for number in range(20):
        fd = os.open(point / f"new{number}", os.O_CREAT | os.O_RDWR)
        os.pwrite(fd, b"n", 100)
        os.close(fd)
        assert (point / f"new{number}").read_bytes() == bytes(100) + b"n"


def test_removed_files_leave_no_bytes_also_if_they_were_open(new_mounted: Callable[[], Mounted]) -> None:
    mounted = new_mounted()
    point, files = mounted.point, mounted.gateway.volume / "files"
    (point / "a").write_bytes(b"a" * 10_000)
    with (point / "b").open("w+b") as held:
        held.write(b"b" * 10_000)
        (point / "a").unlink()
        (point / "b").unlink()
        held.seek(0)
        assert held.read() == b"b" * 10_000
        assert list(point.iterdir()) == []
        again(mounted)
        with contextlib.suppress(OSError):
            held.close()
    wait_for(lambda: not [path for path in files.rglob("*") if path.is_file()], "the bytes to be removed")
    assert list(point.iterdir()) == []


def test_when_the_gateway_ends_it_is_unmounted(new_mounted: Callable[[], Mounted]) -> None:
    mounted = new_mounted()
    mounted.gateway.stop(signal.SIGKILL)
    assert mounted.ended() == 3
    assert not os.path.ismount(mounted.point)
    assert "unmounted: the gateway is gone" in mounted.log.read_text()


def test_there_is_one_writer(new_mounted: Callable[[], Mounted], tmp_path: Path) -> None:
    mounted = new_mounted()
    words = [sys.executable, "-m", "tools", "mount", str(tmp_path), "--data", str(mounted.gateway.folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, "tandem: another process serves the share\n")
    assert mounted.end() == 0
    mounted.mount()  # and after it has gone, the next


class OnDisk(Gateway):
    """Its volume and its state are file systems of their own, whose power can be cut."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.disks = Disks(folder, 300)

    def make(self) -> None:
        (self.folder / "volumes" / "disk1").mkdir(parents=True)
        self.disks.create(1)
        (self.folder / "volume").symlink_to(self.folder / "volumes" / "disk1")


@pytest.fixture
def on_disk(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    gateway = OnDisk(scratch / request.node.name)
    gateway.make()
    gateway.start()
    mounted = Mounted(gateway, scratch / f"{request.node.name}-mount")
    try:
        yield mounted.mount()
    finally:
        mounted.end(signal.SIGKILL)
        gateway.stop(signal.SIGKILL)
        gateway.disks.unmount()


class Writer:
    """Writes blocks that say their number and version, flushes now and then, makes, renames and removes files; and
    knows what was flushed."""

    FILES, BLOCKS = 6, 8

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.flushed: dict[tuple[int, int], int] = {}  # file, block -> version that was flushed last
        self.latest: dict[tuple[int, int], int] = {}
        self.renamed = 0  # the highest number of a file whose rename was answered
        self.version = 0
        self.enough = threading.Event()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while not self.enough.is_set():
                self.round()

    def round(self) -> None:
        number = self.rng.randrange(self.FILES)
        fd = os.open(self.folder / f"f{number}", os.O_CREAT | os.O_RDWR)
        try:
            for _ in range(self.rng.randrange(1, 6)):
                block = self.rng.randrange(self.BLOCKS)
                self.version += 1
                self.latest[number, block] = self.version
                os.pwrite(fd, contents(number, block, self.version), block * BLOCK)
            if self.rng.random() < 0.5:
                os.fsync(fd)
                self.note(number)
        finally:
            os.close(fd)
        self.note(number)
        if self.rng.random() < 0.2:
            temporary = self.folder / "temporary"
            temporary.write_bytes(b"%d" % (self.renamed + 1))
            temporary.rename(self.folder / "renamed")
            self.renamed += 1

    def note(self, number: int) -> None:
        self.flushed.update({key: version for key, version in self.latest.items() if key[0] == number})

    def check(self) -> None:
        for (number, block), version in self.flushed.items():
            with (self.folder / f"f{number}").open("rb") as file:
                file.seek(block * BLOCK)
                found = file.read(BLOCK)
            said = int(found[:16])
            assert version <= said <= self.latest[number, block], "an older version, or one that nobody wrote"
            assert found == contents(number, block, said), "bytes of two versions"
        if self.renamed:
            assert int((self.folder / "renamed").read_bytes()) >= self.renamed


def contents(number: int, block: int, version: int) -> bytes:
    return (b"%016d" % version + b"%08d%08d" % (number, block)) * (BLOCK // 32)


@pytest.mark.parametrize("seed", range(3))
def test_what_was_flushed_survives_a_power_cut(on_disk: Mounted, seed: int) -> None:
    gateway = on_disk.gateway
    assert isinstance(gateway, OnDisk)
    writer = Writer(on_disk.point, seed)
    for cut in range(2):
        writer.enough.clear()
        thread = threading.Thread(target=writer.run)
        thread.start()
        wait_for(lambda so_far=(cut + 1) * VERSIONS: writer.version > so_far, "some writes")
        gateway.disks.cut_power()
        writer.enough.set()
        gateway.stop(signal.SIGKILL)
        on_disk.end(signal.SIGKILL)
        thread.join(30)
        gateway.disks.unmount()
        gateway.disks.mount()
        gateway.start()
        on_disk.mount()
        writer.check()


def test_a_catalogue_made_anew_keeps_the_names(new_mounted: Callable[[], Mounted]) -> None:
    mounted = new_mounted()
    (mounted.point / "folder").mkdir()
    (mounted.point / "folder" / "a").write_bytes(b"a" * 5000)
    before, inodes = tree(mounted.point), numbers(mounted.point)
    mounted.end(signal.SIGKILL)
    mounted.gateway.stop(signal.SIGKILL)
    assert "2 names of the share's files" in mounted.gateway.rebuild_index()
    mounted.gateway.start()
    mounted.mount()
    assert (tree(mounted.point), numbers(mounted.point)) == (before, inodes)


def test_names_that_are_lost_are_said_to_be_and_the_bytes_are_nobody_elses(new_mounted: Callable[[], Mounted]) -> None:
    mounted = new_mounted()
    (mounted.point / "a").write_bytes(b"a" * 5000)
    mounted.end()
    mounted.gateway.stop()
    for path in (mounted.gateway.folder / "state" / "catalogue").iterdir():
        path.unlink()
    assert "their bytes stay below files/" in mounted.gateway.rebuild_index()
    mounted.gateway.start()
    mounted.mount()
    for number in range(40):
        fd = os.open(mounted.point / f"new{number}", os.O_CREAT | os.O_RDWR)
        os.pwrite(fd, b"n", 100)
        os.close(fd)
        assert (mounted.point / f"new{number}").read_bytes() == bytes(100) + b"n"
    kept = [path.read_bytes() for path in (mounted.gateway.volume / "files").rglob("*") if path.is_file()]
    assert b"a" * 5000 in kept


def test_what_was_answered_is_kept_when_it_ends_while_the_gateway_is_slow(new_mounted: Callable[[], Mounted]) -> None:
    mounted = new_mounted()
    paths = [mounted.point / f"{number}" for number in range(200)]
    for path in paths:
        path.write_bytes(b"x")
    os.kill(mounted.gateway.pid, signal.SIGSTOP)
    for path in paths:
        path.chmod(0o600)
    threading.Timer(2.0, os.kill, (mounted.gateway.pid, signal.SIGCONT)).start()
    assert mounted.end() == 0
    mounted.mount()
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}


def test_a_file_whose_disk_is_away_is_as_it_was_when_it_is_back(new_mounted: Callable[[], Mounted]) -> None:
    mounted = new_mounted()
    gateway, other = mounted.gateway, mounted.gateway.folder / "other"
    mounted.end()
    order(gateway.folder / "standalone.sock", "volume-add", {"path": str(other)})
    mounted.mount()
    names = [f"f{number}" for number in range(30)]
    for name in names:
        (mounted.point / name).write_bytes(b"x" * 50_000)
    empty = mounted.point / "empty"
    empty.write_bytes(b"")
    fds = [os.open(mounted.point / name, os.O_RDWR) for name in names]
    for fd in fds:
        os.pwrite(fd, b"y", 0)  # dirty when the power goes
    mounted.end(signal.SIGKILL)
    gateway.stop(signal.SIGKILL)
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    away = other.with_name("away")
    other.rename(away)
    gateway.start()
    mounted.mount()
    seen = [name for name in names if is_readable(mounted.point / name)]
    assert 0 < len(seen) < len(names)
    mounted.end()
    gateway.stop()
    away.rename(other)
    gateway.start()
    mounted.mount()
    assert {(mounted.point / name).read_bytes()[1:] for name in names} == {b"x" * 49_999}


def is_readable(path: Path) -> bool:
    assert path.stat().st_size == 50_000
    try:
        path.read_bytes()
    except OSError as error:
        assert error.errno == errno.EIO
        return False
    return True


def copies_below(volume: Path) -> list[Path]:
    return [path for path in (volume / "files").rglob("*") if path.is_file()]


def test_a_volume_is_emptied_of_files_while_they_are_written_to(new_mounted: Callable[[], Mounted]) -> None:
    """A volume that is added while the share is mounted takes what leaves another one; what is open is written on."""
    mounted = new_mounted()
    point, volume = mounted.point, mounted.gateway.volume
    other = volume.with_name("other")
    for number in range(20):
        (point / f"file {number}").write_bytes(os.urandom(5000 + number))
    with (point / "sparse").open("wb") as file:
        file.seek(9 << 20)
        file.write(b"end")
    before = tree(point)
    database = os.open(point / "database", os.O_CREAT | os.O_RDWR)
    os.pwrite(database, b"one", 0)
    os.fsync(database)
    os.pwrite(database, b"two", 3)  # nobody has flushed it

    def ordered(name: str, **given: object) -> dict[str, object]:
        return order(mounted.gateway.folder / "standalone.sock", name, given, timeout_s=120)

    with pytest.raises(OrderFailed, match="holds 22 files of the share; `tandem volume drain"):
        ordered("volume-retire", path=str(volume))
    ordered("volume-add", path=str(other))
    result = ordered("volume-drain", path=str(volume))
    assert (result["files_moved"], result["files_left"], result["why"]) == (22, 0, "")
    os.pwrite(database, b"three", 6)
    os.fsync(database)
    ordered("volume-retire", path=str(volume))
    (point / "new").write_bytes(b"new")
    before |= {"database": b"onetwothree", "new": b"new"}
    assert tree(point) == before
    assert len(copies_below(other)) == 23
    assert sum(path.stat().st_blocks * 512 for path in copies_below(other)) < (9 << 20)
    os.close(database)
    again(mounted)
    assert tree(point) == before


def test_files_are_only_moved_while_somebody_serves_the_share(new_mounted: Callable[[], Mounted]) -> None:
    mounted = new_mounted()
    (mounted.point / "a").write_bytes(b"x")
    mounted.end()
    socket, volume = mounted.gateway.folder / "standalone.sock", mounted.gateway.volume
    with pytest.raises(OrderFailed, match="the only volume that takes anything; add another one first"):
        order(socket, "volume-drain", {"path": str(volume)})
    order(socket, "volume-add", {"path": str(volume.with_name("other"))})
    result = order(socket, "volume-drain", {"path": str(volume)}, timeout_s=120)
    assert result["files_left"] == 1
    assert "isn't served now" in str(result["why"])


def test_ending_while_many_write_is_no_crash(new_mounted: Callable[[], Mounted]) -> None:
    mounted, enough = new_mounted(), threading.Event()

    def write(number: int) -> None:
        with contextlib.suppress(OSError):
            while not enough.is_set():
                (mounted.point / f"{number}-{os.urandom(1)[0] % 5}").write_bytes(os.urandom(20_000))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(list(mounted.point.iterdir())) >= 30, "some files")
    assert mounted.end() == 0
    enough.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_nothing_is_left_of_files_removed_while_they_are_closed(new_mounted: Callable[[], Mounted]) -> None:
    mounted = new_mounted()

    def churn(number: int) -> None:
        for round_ in range(60):
            path = mounted.point / f"{number}-{round_}"
            path.write_bytes(b"x" * 1000)
            path.unlink()

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    files = mounted.gateway.volume / "files"
    wait_for(lambda: not [path for path in files.rglob("*") if path.is_file()], "the bytes to be removed")
