"""Any mixture of system calls on the mounted share answers and looks as on a file system of the kernel's."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from storage.objects.local_files import RENAME_EXCHANGE, RENAME_NOREPLACE
from tests.conftest import FUZZ
from tests.gateway.share.conftest import Mounted
from tests.storage.state.renaming import renameat2

Names = tuple[bytes, ...]
DEPTH_MAX = 4
NAME = st.sampled_from([b"a", b"a", b"b", b"b", b"A", b"c", "ä".encode(), b"x" * 255, b"x" * 256])
PRESENT = st.integers(0, 99)  # one of those that are there
FRESH = st.tuples(st.integers(0, 99), NAME)  # a name in one of the folders
SIZES = st.sampled_from([0, 1, 100, 4095, 4096, 5000, 131072, 300000])
BYTES = st.tuples(st.integers(1, 255), st.sampled_from([1, 10, 4096, 5000, 140000])).map(
    lambda of: bytes([of[0]]) * of[1]
)
KEYS = st.sampled_from([b"user.a", b"user.b"])
FLAGS = st.sampled_from([os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_TRUNC, os.O_RDONLY])


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, error.errno)


class Both(RuleBasedStateMachine):
    point: Path  # where the share is mounted
    memory: Path

    def __init__(self) -> None:
        super().__init__()
        self.roots = [os.fsencode(tempfile.mkdtemp(dir=where)) for where in (self.memory, self.point)]
        for root in self.roots:
            os.chmod(root, 0o755)
        self.present: list[Names] = [()]
        self.open: list[list[int]] = []
        self.umask = os.umask(0)

    def teardown(self) -> None:
        os.umask(self.umask)
        for fds in self.open:
            for fd in fds:
                os.close(fd)
        for root in self.roots:
            shutil.rmtree(root)

    def at(self, root: bytes, where: Any) -> bytes:
        if isinstance(where, int):
            return os.path.join(root, *self.present[where % len(self.present)])
        folders = [one for one in self.present if os.path.isdir(os.path.join(root, *one)) and len(one) < DEPTH_MAX]
        return os.path.join(root, *folders[where[0] % len(folders)], where[1])

    def both(self, call: Callable[[bytes], Any], *where: Any) -> None:
        expected, found = (
            outcome(lambda root=root: call(*(self.at(root, one) for one in where))) for root in self.roots
        )
        assert found == expected

    def on_both(self, which: int, call: Callable[[int], Any]) -> None:
        """By an open file."""
        expected, found = (outcome(lambda fd=fd: call(fd)) for fd in self.open[which % len(self.open)])
        assert found == expected

    # -- names -------------------------------------------------------------------------------------------------

    @rule(where=FRESH, mode=st.sampled_from([0o755, 0o700]))
    def mkdir(self, where: Any, mode: int) -> None:
        self.both(lambda path: os.mkdir(path, mode), where)

    @rule(where=FRESH, data=BYTES)
    def create(self, where: Any, data: bytes) -> None:
        def call(path: bytes) -> None:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            os.write(fd, data)
            os.close(fd)

        self.both(call, where)

    @rule(where=FRESH)
    def mknod(self, where: Any) -> None:
        self.both(lambda path: os.mknod(path, 0o640 | stat.S_IFREG), where)

    @rule(where=FRESH)
    def mkfifo(self, where: Any) -> None:
        self.both(lambda path: os.mkfifo(path, 0o640), where)

    @rule(where=FRESH)
    def symlink(self, where: Any) -> None:
        self.both(lambda path: os.symlink(b"nowhere", path), where)

    @rule(where=PRESENT, to=FRESH)
    def link(self, where: Any, to: Any) -> None:
        self.both(lambda path, other: os.link(path, other, follow_symlinks=False), where, to)

    @rule(where=PRESENT, to=st.one_of(PRESENT, FRESH), flags=st.sampled_from([0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE]))
    def rename(self, where: int, to: Any, flags: int) -> None:
        if where % len(self.present):  # the topmost folders are in different file systems
            self.both(lambda path, other: renameat2(path, other, flags), where, to)

    @rule(where=PRESENT, folder=st.booleans())
    def remove(self, where: int, folder: bool) -> None:
        if where % len(self.present):
            self.both(os.rmdir if folder else os.unlink, where)

    # -- attributes --------------------------------------------------------------------------------------------

    @rule(where=PRESENT, mode=st.sampled_from([0o600, 0o644, 0o777, 0o2755, 0o4755]))
    def chmod(self, where: int, mode: int) -> None:
        self.both(lambda path: None if os.path.islink(path) else os.chmod(path, mode), where)

    @rule(where=PRESENT, uid=st.sampled_from([0, 1000]), gid=st.sampled_from([0, 100]))
    def chown(self, where: int, uid: int, gid: int) -> None:
        self.both(lambda path: os.chown(path, uid, gid, follow_symlinks=False), where)

    @rule(where=PRESENT, atime=st.integers(0, 10**18), mtime=st.integers(0, 10**18))
    def utimens(self, where: int, atime: int, mtime: int) -> None:
        def call(path: bytes) -> tuple[int, int]:
            os.utime(path, ns=(atime, mtime), follow_symlinks=False)
            return os.lstat(path).st_atime_ns, os.lstat(path).st_mtime_ns

        self.both(call, where)

    @rule(
        where=PRESENT,
        key=KEYS,
        value=st.binary(max_size=9),
        flags=st.sampled_from([0, os.XATTR_CREATE, os.XATTR_REPLACE]),
    )
    def setxattr(self, where: int, key: bytes, value: bytes, flags: int) -> None:
        self.both(lambda path: os.setxattr(path, key, value, flags, follow_symlinks=False), where)

    @rule(where=PRESENT, key=KEYS)
    def removexattr(self, where: int, key: bytes) -> None:
        self.both(lambda path: os.removexattr(path, key, follow_symlinks=False), where)

    # -- bytes -------------------------------------------------------------------------------------------------

    @rule(where=PRESENT, flags=FLAGS)
    def opens(self, where: int, flags: int) -> None:
        fds = [
            outcome(lambda root=root: os.open(self.at(root, where), flags | os.O_NONBLOCK | os.O_NOFOLLOW))
            for root in self.roots
        ]
        if all(isinstance(fd, int) for fd in fds):
            self.open.append(fds)
        else:
            assert fds[0] == fds[1]

    @rule(where=PRESENT, size=SIZES)
    def truncates(self, where: int, size: int) -> None:
        def call(path: bytes) -> None:
            if os.path.islink(path) or stat.S_ISFIFO(os.lstat(path).st_mode):
                return  # nobody is at the other end
            os.truncate(path, size)

        self.both(call, where)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9), at=SIZES, data=BYTES)
    def writes(self, which: int, at: int, data: bytes) -> None:
        self.on_both(which, lambda fd: os.pwrite(fd, data, at))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9), at=SIZES, size=SIZES)
    def reads(self, which: int, at: int, size: int) -> None:
        self.on_both(which, lambda fd: os.pread(fd, size, at))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9), size=SIZES)
    def cuts(self, which: int, size: int) -> None:
        self.on_both(which, lambda fd: os.ftruncate(fd, size))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9))
    def syncs(self, which: int) -> None:
        if all(not stat.S_ISFIFO(os.fstat(fd).st_mode) for fd in self.open[which % len(self.open)]):
            self.on_both(which, os.fsync)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9))
    def closes(self, which: int) -> None:
        for fd in self.open.pop(which % len(self.open)):
            os.close(fd)

    # -- looking -----------------------------------------------------------------------------------------------

    @invariant()
    def looks_the_same(self) -> None:
        found: list[Names] = []
        self.compare((), found)
        self.present = [(), *sorted(found)]
        for fds in self.open:
            one, other = (os.fstat(fd) for fd in fds)
            assert (other.st_nlink, other.st_size * stat.S_ISREG(one.st_mode)) == (
                one.st_nlink,
                one.st_size * stat.S_ISREG(one.st_mode),
            )

    def compare(self, names: Names, found: list[Names]) -> None:
        real, ours = (os.path.join(root, *names) for root in self.roots)
        one, other = os.lstat(real), os.lstat(ours)
        for name in ("st_mode", "st_uid", "st_gid", "st_nlink"):
            assert getattr(other, name) == getattr(one, name), (ours, name)
        if not stat.S_ISDIR(one.st_mode):
            assert other.st_size == one.st_size
        assert {
            key: os.getxattr(ours, key, follow_symlinks=False) for key in os.listxattr(ours, follow_symlinks=False)
        } == {key: os.getxattr(real, key, follow_symlinks=False) for key in os.listxattr(real, follow_symlinks=False)}
        if stat.S_ISREG(one.st_mode):
            assert Path(os.fsdecode(ours)).read_bytes() == Path(os.fsdecode(real)).read_bytes()
        elif stat.S_ISDIR(one.st_mode):
            inside = sorted(os.listdir(real))
            assert sorted(os.listdir(ours)) == inside
            for one_name in inside:
                found.append((*names, one_name))
                self.compare((*names, one_name), found)


@pytest.mark.timeout(900)
def test_any_mixture_of_calls(mounted: Mounted, scratch: Path) -> None:
    machine = type("BothHere", (Both,), {"point": mounted.point, "memory": scratch})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=30 * FUZZ, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
