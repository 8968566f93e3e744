"""Names and attributes of files are as those of a real file system: any mixture of calls answers and looks the same."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from storage.objects.local_files import RENAME_EXCHANGE, RENAME_NOREPLACE
from storage.state import file_rows, file_soundness
from storage.state.file_model import (
    ROOT,
    BeginWriting,
    Change,
    Drop,
    Flush,
    Held,
    Lacks,
    Link,
    Make,
    Remove,
    RemoveUser,
    RemoveXattr,
    Rename,
    SetAttributes,
    SetUser,
    SetXattr,
)
from storage.state.files import Applied, apply
from storage.state.kv import Transaction
from tests.simulation.machine import MemoryKv
from tests.storage.state.renaming import renameat2

NAMES = [b"a", b"a", b"b", b"b", b"A", b"c", "ä".encode(), b"x" * 255, b"x" * 256]
name = st.sampled_from(NAMES)
Names = tuple[bytes, ...]
anywhere = st.lists(name, min_size=1, max_size=3).map(tuple)
# One of those that are there, by its place among them, or any; and a new name beside one that is there.
present = st.one_of(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), anywhere)
fresh = st.one_of(st.tuples(st.integers(0, 99), name), st.integers(0, 99), anywhere)
Where = int | Names | tuple[int, bytes]
xattr_names = st.sampled_from([b"user.a", b"user.b"])
xattr_flags = st.sampled_from([0, os.XATTR_CREATE, os.XATTR_REPLACE])
DEPTH_MAX = 5
TARGET = b"nowhere/at/all"  # a link that is followed leads to nothing


class Model:
    """System calls by path on the state machine, as the kernel makes them."""

    def __init__(self) -> None:
        self.kv = MemoryKv()
        self.at = 2 * 10**18  # behind all that a test sets
        self.open: dict[int, int] = {}  # inode -> how often
        self.do(BeginWriting("space"))

    def do(self, change: Change) -> Applied:
        return self.kv.update(lambda txn: apply(txn, change))

    def read(self, look: Callable[[Transaction], Any]) -> Any:
        with self.kv.read() as txn:
            return look(txn)

    def walk(self, names: Names) -> int:
        """The inode a path leads to. Raises OSError."""
        number = ROOT
        for part in names:
            row = self.read(lambda txn, number=number: file_rows.inode(txn, number))
            if stat.S_ISLNK(row.mode):
                raise OSError(errno.ENOENT, "")
            number = self.read(lambda txn, number=number, part=part: file_rows.lookup(txn, number, part)).inode
        return number

    def parent(self, names: Names) -> int:
        number = self.walk(names[:-1])
        row = self.read(lambda txn: file_rows.inode(txn, number))
        if stat.S_ISLNK(row.mode):
            raise OSError(errno.ENOENT, "")
        if not stat.S_ISDIR(row.mode):
            raise OSError(errno.ENOTDIR, "")
        return number

    def held(self, names: Names) -> bool:
        with contextlib.suppress(OSError):
            return self.walk(names) in self.open
        return False


def outcome(call: Callable[[], Any]) -> int:
    """The errno of a call, 0 if it succeeded."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def tick(probe: int, newest: int) -> None:
    """Wait until what is changed now is newer than that, by the file system's own clock: some milliseconds. `probe`: fd
    of a file on it."""
    while True:
        os.utime(probe)
        if os.fstat(probe).st_ctime_ns > newest:
            return
        time.sleep(0.0005)


class SameAsReal(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        shared = Path("/dev/shm")
        self.real = os.fsencode(tempfile.mkdtemp(prefix="tandem-test-", dir=shared if shared.is_dir() else None))
        os.chmod(self.real, 0o755)
        self.probe = os.open(os.path.dirname(self.real), os.O_RDWR | os.O_TMPFILE)
        self.model = Model()
        self.twin: dict[int, int] = {}  # real inode -> ours
        self.seen: dict[int, tuple[int, int, int, int]] = {}  # real inode -> real mtime, ctime, and ours
        self.fds: list[tuple[int, int]] = []  # (fd, our inode)
        self.present: list[Names] = []
        self.umask = os.umask(0)

    def teardown(self) -> None:
        os.umask(self.umask)
        for fd in (self.probe, *(fd for fd, _ in self.fds)):
            os.close(fd)
        shutil.rmtree(self.real)

    def at(self, names: Names) -> bytes:
        return os.path.join(self.real, *names)

    def both(self, real: Callable[[], Any], change: Callable[[], Any]) -> None:
        self.model.at += 1
        tick(self.probe, max((max(times[:2]) for times in self.seen.values()), default=0))
        expected = outcome(real)
        found = outcome(change)
        assert errno.errorcode.get(found, found) == errno.errorcode.get(expected, expected)

    def path(self, where: Where) -> Names:
        if isinstance(where, int):
            return self.present[where % len(self.present)] if self.present else (b"a",)
        if isinstance(where[0], int):
            folders = [(), *(one for one in self.present if os.path.isdir(self.at(one)) and len(one) < DEPTH_MAX)]
            return (*folders[where[0] % len(folders)], where[1])
        return where

    # -- calls -------------------------------------------------------------------------------------------------

    def make(self, names: Names, mode: int, target: bytes = b"") -> None:
        self.model.do(Make(self.model.parent(names), names[-1], mode, 0, 0, self.model.at, target=target))

    @rule(where=fresh, mode=st.sampled_from([0o755, 0o700, 0o2775]))
    def mkdir(self, where: Where, mode: int) -> None:
        names = self.path(where)

        def real() -> None:
            os.mkdir(self.at(names), mode & 0o777)
            if mode & stat.S_ISGID:
                os.chmod(self.at(names), mode)

        def ours() -> None:
            self.make(names, stat.S_IFDIR | (mode & 0o777))
            if mode & stat.S_ISGID:
                self.model.do(SetAttributes(self.model.walk(names), self.model.at, mode=mode))

        self.both(real, ours)

    @rule(where=fresh, mode=st.sampled_from([0o644, 0o600]))
    def create(self, where: Where, mode: int) -> None:
        names = self.path(where)

        def real() -> None:
            os.close(os.open(self.at(names), os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))

        self.both(real, lambda: self.make(names, stat.S_IFREG | mode))

    @rule(where=fresh)
    def symlink(self, where: Where) -> None:
        names = self.path(where)
        self.both(
            lambda: os.symlink(TARGET, self.at(names)), lambda: self.make(names, stat.S_IFLNK | 0o777, target=TARGET)
        )

    @rule(where=fresh)
    def mkfifo(self, where: Where) -> None:
        names = self.path(where)
        self.both(lambda: os.mkfifo(self.at(names), 0o640), lambda: self.make(names, stat.S_IFIFO | 0o640))

    @rule(where=present, to_where=fresh)
    def link(self, where: Where, to_where: Where) -> None:
        names, to = self.path(where), self.path(to_where)
        self.both(
            lambda: os.link(self.at(names), self.at(to), follow_symlinks=False),
            lambda: self.model.do(Link(self.model.walk(names), self.model.parent(to), to[-1], self.model.at)),
        )

    @rule(where=present, folder=st.booleans())
    def remove(self, where: Where, folder: bool) -> None:
        names = self.path(where)
        held = self.model.held(names)
        self.both(
            lambda: (os.rmdir if folder else os.unlink)(self.at(names)),
            lambda: self.model.do(Remove(self.model.parent(names), names[-1], folder, self.model.at, held)),
        )

    @rule(where=present, to_where=fresh, flags=st.sampled_from([0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE]))
    def rename(self, where: Where, to_where: Where, flags: int) -> None:
        names, to = self.path(where), self.path(to_where)
        held = self.model.held(to)
        self.both(
            lambda: renameat2(self.at(names), self.at(to), flags),
            lambda: self.model.do(
                Rename(
                    self.model.parent(names),
                    names[-1],
                    self.model.parent(to),
                    to[-1],
                    self.model.at,
                    no_replace=flags == RENAME_NOREPLACE,
                    exchange=flags == RENAME_EXCHANGE,
                    held=held,
                )
            ),
        )

    @rule(where=present, uid=st.sampled_from([0, 1000]), gid=st.sampled_from([0, 100]))
    def chown(self, where: Where, uid: int, gid: int) -> None:
        names = self.path(where)

        def ours() -> None:
            self.model.do(SetAttributes(self.model.walk(names), self.model.at, uid=uid, gid=gid))

        self.both(lambda: os.chown(self.at(names), uid, gid, follow_symlinks=False), ours)

    @rule(where=present, atime=st.integers(0, 10**18), mtime=st.integers(0, 10**18))
    def utimens(self, where: Where, atime: int, mtime: int) -> None:
        names = self.path(where)

        def ours() -> None:
            self.model.do(SetAttributes(self.model.walk(names), self.model.at, atime=atime, mtime=mtime))

        self.both(lambda: os.utime(self.at(names), ns=(atime, mtime), follow_symlinks=False), ours)
        with contextlib.suppress(OSError):
            number = self.model.walk(names)
            row = self.model.read(lambda txn: file_rows.inode(txn, number))
            real = os.lstat(self.at(names))
            assert (row.atime, row.mtime) == (real.st_atime_ns, real.st_mtime_ns)

    def is_plain(self, names: Names) -> bool:
        with contextlib.suppress(OSError):
            return not stat.S_IFMT(os.lstat(self.at(names)).st_mode) & ~(stat.S_IFREG | stat.S_IFDIR)
        return True

    @rule(
        where=present,
        key=xattr_names,
        value=st.binary(max_size=20),
        flags=xattr_flags,
    )
    def setxattr(self, where: Where, key: bytes, value: bytes, flags: int) -> None:
        names = self.path(where)
        if not self.is_plain(names):
            return  # the kernel has no `user.` attributes of others

        def ours() -> None:
            create, replace = flags == os.XATTR_CREATE, flags == os.XATTR_REPLACE
            self.model.do(SetXattr(self.model.walk(names), key, value, self.model.at, create, replace))

        self.both(lambda: os.setxattr(self.at(names), key, value, flags, follow_symlinks=False), ours)

    @rule(where=present, key=xattr_names)
    def removexattr(self, where: Where, key: bytes) -> None:
        names = self.path(where)
        if self.is_plain(names):
            self.both(
                lambda: os.removexattr(self.at(names), key, follow_symlinks=False),
                lambda: self.model.do(RemoveXattr(self.model.walk(names), key, self.model.at)),
            )

    @rule(where=present)
    def hold(self, where: Where) -> None:
        """Keep it open."""
        names = self.path(where)
        with contextlib.suppress(OSError):
            fd = os.open(self.at(names), os.O_PATH | os.O_NOFOLLOW)
            number = self.model.walk(names)
            self.fds.append((fd, number))
            self.model.open[number] = self.model.open.get(number, 0) + 1

    @precondition(lambda self: self.fds)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        fd, number = self.fds.pop(data.draw(st.integers(0, len(self.fds) - 1)))
        os.close(fd)
        self.model.open[number] -= 1
        if not self.model.open[number]:
            del self.model.open[number]
            row = self.model.read(lambda txn: file_rows.inode(txn, number))
            if not row.nlink:
                copies = ((number, ""),) if stat.S_ISREG(row.mode) else ()
                assert self.model.do(Drop(number)).gone == copies

    # -- looking -----------------------------------------------------------------------------------------------

    @invariant()
    def looks_the_same(self) -> None:
        now: dict[int, int] = {}
        found: list[Names] = []
        with self.model.kv.read() as txn:
            assert list(file_soundness.broken(txn)) == []
            self.compare(txn, (), ROOT, now, found)
            for fd, number in self.fds:
                real = os.fstat(fd)
                now[real.st_ino] = number
                assert file_rows.inode(txn, number).nlink == real.st_nlink
            assert txn.count("file_inodes") == len(set(now.values()) | {ROOT}) - (
                txn.get("file_inodes", file_rows.number_key(ROOT)) is None
            )
        self.twin = now
        self.present = sorted(found)

    def compare(self, txn: Transaction, names: Names, number: int, now: dict[int, int], found: list[Names]) -> None:
        real_path = self.at(names)
        real, row = os.lstat(real_path), file_rows.inode(txn, number)
        assert self.twin.get(real.st_ino, number) == now.setdefault(real.st_ino, number) == number
        assert (oct(row.mode), row.uid, row.gid) == (oct(real.st_mode), real.st_uid, real.st_gid)
        assert row.nlink == real.st_nlink
        before = self.seen.get(real.st_ino)
        if before is not None:
            assert (real.st_mtime_ns != before[0]) == (row.mtime != before[2]), (real_path, "mtime")
            assert (real.st_ctime_ns != before[1]) == (row.ctime != before[3]), (real_path, "ctime")
        self.seen[real.st_ino] = (real.st_mtime_ns, real.st_ctime_ns, row.mtime, row.ctime)
        if stat.S_ISLNK(row.mode):
            assert (row.target, row.size) == (os.readlink(real_path), real.st_size)
        if stat.S_ISREG(row.mode) or stat.S_ISDIR(row.mode):
            keys = [os.fsencode(key) for key in os.listxattr(real_path)]
            assert file_rows.xattr_names(txn, number) == sorted(keys)
            for key in keys:
                assert file_rows.xattr(txn, number, key) == os.getxattr(real_path, key)
        if stat.S_ISDIR(row.mode):
            listed = {one.name: one.inode for one in file_rows.listed(txn, number)}
            assert set(listed) == set(os.listdir(real_path))
            for one, inode in listed.items():
                found.append((*names, one))
                self.compare(txn, (*names, one), inode, now, found)


SameAsReal.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSameAsReal = pytest.mark.skipif(os.geteuid() != 0, reason="chown needs root")(SameAsReal.TestCase)


def made(model: Model, parent: int, *names: bytes) -> list[int]:
    return [model.do(Make(parent, one, stat.S_IFREG | 0o644, 0, 0, 1)).inode for one in names]


def test_a_name_is_found_whatever_its_case() -> None:
    model = Model()
    made(model, ROOT, b"Image.DCM", "MÜLLER".encode(), "straße".encode(), b"\xff\xfe")
    with model.kv.read() as txn:
        assert file_rows.real_name(txn, ROOT, b"image.dcm") == b"Image.DCM"
        assert file_rows.real_name(txn, ROOT, "müller".encode()) == "MÜLLER".encode()
        assert file_rows.real_name(txn, ROOT, "STRAßE".encode()) == "straße".encode()
        assert file_rows.real_name(txn, ROOT, b"STRASSE") is None
        assert file_rows.real_name(txn, ROOT, b"\xff\xfe") == b"\xff\xfe"
        assert file_rows.real_name(txn, ROOT, b"image.dc") is None


def test_a_listing_goes_on_where_it_was_whatever_happens_meanwhile() -> None:
    model = Model()
    made(model, ROOT, *(b"%04d" % number for number in range(100)))
    with model.kv.read() as txn:
        first = [one for one, _ in zip(file_rows.listed(txn, ROOT), range(50), strict=False)]
    for number in range(0, 100, 3):
        model.do(Remove(ROOT, b"%04d" % number, False, 2))
    made(model, ROOT, b"later")
    with model.kv.read() as txn:
        rest = [one.name for one in file_rows.listed(txn, ROOT, first[-1].position)]
    assert rest == [b"%04d" % number for number in range(50, 100) if number % 3] + [b"later"]


def test_what_is_refused_changes_nothing() -> None:
    model = Model()
    folder = model.do(Make(ROOT, b"f", stat.S_IFDIR | 0o755, 0, 0, 1)).inode
    made(model, folder, b"one")
    with model.kv.read() as txn:
        before = {table: list(txn.scan(table)) for table in file_rows.TABLES}
    for change in (
        Make(ROOT, b"f", stat.S_IFREG, 0, 0, 2),
        Make(99, b"x", stat.S_IFREG, 0, 0, 2),
        Remove(ROOT, b"f", True, 2),
        Remove(ROOT, b"f", False, 2),
        Rename(ROOT, b"f", folder, b"x", 2),
        Rename(folder, b"one", ROOT, b"f", 2),
        Link(folder, ROOT, b"x", 2),
        Drop(folder),
        SetXattr(folder, b"user.a", b"", 2, replace=True),
        RemoveXattr(folder, b"user.a", 2),
        Make(ROOT, b"a/b", stat.S_IFREG, 0, 0, 2),
        Make(ROOT, b"..", stat.S_IFREG, 0, 0, 2),
    ):
        with pytest.raises(OSError, match=r"\[Errno"):
            model.do(change)
        with model.kv.read() as txn:
            assert {table: list(txn.scan(table)) for table in file_rows.TABLES} == before


def test_the_last_copy_is_never_noted_as_lost() -> None:
    """It may come back with its disk; noted, neither node would give it, and none would take the other's."""
    model = Model()
    number = model.do(Make(ROOT, b"a", stat.S_IFREG | 0o644, 0, 0, 1)).inode
    model.do(Flush(number, 5, 2, 2, clean=True, lacking=("b",)))
    model.do(Lacks(number, "a"))
    with model.kv.read() as txn:
        assert file_rows.lacking(txn, number) == ("b",)
    model.do(Held(number, "b", "5b1d0e77"))
    model.do(Lacks(number, "a"))
    model.do(Flush(number, 6, 3, 3, clean=True))
    with model.kv.read() as txn:
        assert file_rows.lacking(txn, number) == ("a",)
        assert file_rows.generation(txn, number, "b") == "5b1d0e77"
    assert sorted(model.do(Remove(ROOT, b"a", False, 4)).gone) == [(number, ""), (number, "5b1d0e77")]
    with model.kv.read() as txn:
        assert list(file_rows.all_lacking(txn)) == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["new", "password", "remove"])), max_size=30))
def test_a_users_number_is_never_given_again(changes: list[tuple[str, str]]) -> None:
    model, known, given_numbers = Model(), dict[str, tuple[int, bytes]](), set[int]()
    for at, (name, what) in enumerate(changes):
        nt_hash = at.to_bytes(16, "big")
        allowed = (name in known) != (what == "new")
        change = RemoveUser(name) if what == "remove" else SetUser(name, nt_hash, at, what == "new")
        with contextlib.nullcontext() if allowed else pytest.raises(file_rows.FileRefused):
            model.do(change)
        found = model.read(file_rows.users)
        assert not model.read(lambda txn: list(file_soundness.broken(txn)))
        if allowed and what == "remove":
            del known[name]
        elif allowed:
            number = found[name].number
            assert number == known[name][0] if what == "password" else number not in given_numbers
            given_numbers.add(number)
            known[name] = (number, nt_hash)
        assert {one: (user.number, user.nt_hash) for one, user in found.items()} == known
