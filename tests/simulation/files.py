"""A program that works on the share's files through all faults, and what it knows of them.

Each file is made, written to at any place, cut, flushed, closed, renamed over another, removed. What was flushed is
there for ever after, on whichever node leads: of what came later any part may be there, byte by byte, and nothing else.
"""

import asyncio
import contextlib
import errno
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from storage.engine import Engine
from storage.files.catching_up import CatchingUp
from storage.files.copies import CopyStore
from storage.files.namespace import Namespace
from storage.files.peer import Pair, PeerLost
from storage.files.share import Share
from storage.ingest import NotServing, Proposal
from storage.state import file_rows, file_soundness
from storage.state.file_model import ROOT, Change
from storage.workers import Threads
from tests.simulation.world import Violation, World

NAMES: Final = tuple(f"f{number}".encode() for number in range(5))
SIZE_MAX: Final = 5000
ACTORS: Final = 3
MOVES: Final = 4  # in one world of so many copies are moved from disk to disk
HANG_S: Final = 2.0
WROTE, CUT = "wrote", "cut"


@dataclass
class Content:
    """Of one inode. `flushed`: what was there when a flush began that was answered; `later`: what was asked since."""

    flushed: bytes = b""
    later: list[tuple[str, int, bytes]] = field(default_factory=list)
    answered: bool = False  # that it is there at all
    removing: bool = False  # it was asked to be removed, or to be replaced
    removed: bool = False  # and that was answered

    def may_be(self, found: bytes) -> str:
        """ "" or why it can't."""
        sizes = [len(self.flushed)]
        for kind, at, data in self.later:
            sizes.append(at if kind == CUT else at + len(data))
        if not min(sizes) <= len(found) <= max(sizes):
            return f"{len(found)} bytes, and it had {sizes}"
        if not self.later:
            return "" if found == self.flushed else f"other bytes from {_first_difference(found, self.flushed)} on"
        for at, value in enumerate(found):
            if at < len(self.flushed) and value == self.flushed[at]:
                continue
            if not any(self._wrote(one, at, value) for one in self.later) and (value or at < len(self.flushed)):
                return f"byte {at} is {value}"
        return ""

    @staticmethod
    def _wrote(one: tuple[str, int, bytes], at: int, value: int) -> bool:
        kind, start, data = one
        if kind == CUT:
            return value == 0 and at >= start
        return (start <= at < start + len(data) and data[at - start] == value) or (value == 0 and at < start)


def _first_difference(one: bytes, other: bytes) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class KnownFiles:
    def __init__(self) -> None:
        self.contents: dict[int, Content] = {}
        self.answered = 0

    def check(self, number: int, found: bytes, node: str) -> None:
        if why := self.contents[number].may_be(found):
            raise Violation(f"A: inode {number} on node {node}: {why}")


class FileProgram:
    """On one node, while that leads."""

    def __init__(
        self,
        world: World,
        known: KnownFiles,
        engine: Engine,
        node: str,
        threads: Threads,
        spawn: Callable[[Any], asyncio.Task[Any]],
    ) -> None:
        self._world, self._rng, self._known = world, world.rng, known
        self._engine, self._node, self._spawn, self._threads = engine, node, spawn, threads
        self._value = 0
        self._busy: set[int] = set()
        self._names: set[bytes] = set()

    async def run(self) -> None:
        while not self._world.calm:
            with contextlib.suppress(NotServing):
                await self._engine.settle_files()
                with contextlib.suppress(OSError):  # it stopped leading while the program began
                    await self._work()
            await asyncio.sleep(0.1 + self._rng.random())

    async def settle(self, *, careless: bool) -> None:
        """At the end: everything is the same on both nodes, and clean; `careless`: but for what both have lost."""
        await self._engine.settle_files()
        share = await self._begun()
        catching_up = CatchingUp(share)
        deadline = self._world.loop.now + (10 if careless else 300)
        while share.look(lambda rows: file_rows.dirty(rows) or list(file_rows.all_lacking(rows))):
            if self._world.loop.now > deadline:
                if careless:
                    break
                raise Violation("D: the share's files don't become the same on both nodes")
            with contextlib.suppress(PeerLost):
                await catching_up.once(self._engine.mirror.state)
            await asyncio.sleep(0.5)
        await share.end()

    async def _begun(self) -> Share:
        engine, peer = self._engine, self._engine.core.peer
        assert peer is not None
        local: CopyStore = engine.open_copies()
        self._log = _Log(engine)
        share = Share(
            Namespace(engine.catalogue.kv, self._log.propose),
            local,
            self._threads,
            lambda: int(self._world.loop.now * 1e9),
            hang_s=HANG_S,
            pair=Pair(self._node, peer),
            peer=engine.mirror,
        )
        await share.begin()
        return share

    async def _work(self) -> None:
        """Until this node leads no more, or something isn't answered."""
        share = await self._begun()
        self._check_sound()
        await self._check(share)
        keeping = CatchingUp(share)
        catching_up = self._spawn(keeping.run())
        actors = [self._spawn(self._act(share)) for _ in range(ACTORS)]
        if self._world.seed % MOVES == 1:
            actors.append(self._spawn(self._move_on(keeping)))
        try:
            while self._goes_on():
                await asyncio.sleep(0.1)
        finally:
            catching_up.cancel()
            await asyncio.wait((catching_up, *actors))  # as a process is gone before the next one begins
            self._busy.clear()
            self._names.clear()

    def _goes_on(self) -> bool:
        return not (self._world.calm or self._log.ended) and self._engine.may_serve

    def _check_sound(self) -> None:
        with self._engine.catalogue.kv.read() as txn:
            for what in file_soundness.broken(txn):
                raise Violation(f"the share's rows on node {self._node}: {what}")

    async def _check(self, share: Share) -> None:
        """What a new leader has."""
        there = {one.inode for one in share.look(lambda rows: list(file_rows.listed(rows, ROOT)))}
        removed = {number for number, content in self._known.contents.items() if content.removed}
        for number, content in list(self._known.contents.items()):
            if not self._goes_on():
                return  # another node leads, and changes what is known
            if number in there and number in removed:
                raise Violation(f"C: inode {number} was removed, and has a name on node {self._node}")
            if number not in there:
                if content.answered and not content.removing:
                    raise Violation(f"A: inode {number} has no name on node {self._node}")
                continue
            with contextlib.suppress(OSError):  # its bytes aren't here, and the other node isn't either
                await self._read(share, number)

    async def _read(self, share: Share, number: int) -> bytes:
        """All of it, checked. Raises OSError."""
        await share.look_again(number)
        share.open(number)
        try:
            found = await share.read(number, 0, share.attributes(number).size)
        finally:
            with contextlib.suppress(OSError):
                await share.release(number)
        if number not in self._busy and self._goes_on():
            self._known.check(number, found, self._node)
        return found

    async def _move_on(self, keeping: CatchingUp) -> None:
        """Copies leave a disk, now of this node, now of the other one."""
        rng = random.Random(self._world.seed)
        while self._goes_on():
            node = rng.choice(sorted(self._world.disks))
            leaving = rng.choice(self._world.disks[node])
            for disk in self._world.disks[node]:
                disk.leaving = disk is leaving
            keeping.move(node, [number for number, content in self._known.contents.items() if not content.removed])
            await asyncio.sleep(rng.random() * 3)
        for disks in self._world.disks.values():
            for disk in disks:
                disk.leaving = False

    # -- what it does ----------------------------------------------------------------------------------------------

    async def _act(self, share: Share) -> None:
        while self._goes_on():
            await asyncio.sleep(self._rng.random() * 0.3)
            name = self._rng.choice(NAMES)
            if name in self._names:
                continue
            self._names.add(name)
            with contextlib.suppress(OSError):
                await self._act_on(share, name)
            self._names.discard(name)

    async def _act_on(self, share: Share, name: bytes) -> None:
        rng, known = self._rng, self._known.contents
        there = share.look(lambda rows: file_rows.find(rows, ROOT, name))
        choice = rng.random()
        if there is not None and choice < 0.15:
            content = known[there.inode]
            content.removing = True
            await share.remove(ROOT, name, folder=False)
            content.removed = True
            self._known.answered += 1
            return
        if there is not None and choice < 0.3:
            await self._rename(share, name, there.inode)
            return
        if there is not None and choice < 0.45:
            await self._read(share, there.inode)
            return
        if there is None:
            number = share.create(ROOT, name, stat.S_IFREG | 0o644, 0, 0)
            known[number] = Content()
            current = b""
        else:
            number = there.inode
            current = await self._read(share, number)
            share.open(number)
        self._busy.add(number)
        try:
            await self._write_to(share, number, bytearray(current))
        finally:
            self._busy.discard(number)

    async def _rename(self, share: Share, name: bytes, number: int) -> None:
        to = self._rng.choice(NAMES)
        if to in self._names:
            return
        self._names.add(to)
        replaced = share.look(lambda rows: file_rows.find(rows, ROOT, to))
        content = self._known.contents[replaced.inode] if replaced is not None and replaced.inode != number else None
        if content is not None:
            content.removing = True
        try:
            await share.rename(ROOT, name, ROOT, to, no_replace=False, exchange=False)
        finally:
            self._names.discard(to)
        if content is not None:
            content.removed = True
        self._known.answered += 1

    async def _write_to(self, share: Share, number: int, current: bytearray) -> None:
        """An open file, until it is closed."""
        rng, content = self._rng, self._known.contents[number]
        try:
            for _ in range(rng.randrange(1, 6)):
                choice = rng.random()
                if choice < 0.6:
                    await self._change(share, number, content, current)
                elif choice < 0.8:
                    await self._flush(content, current, share.fsync(number), share, number)
                else:
                    found = await share.read(number, 0, SIZE_MAX)
                    if found != bytes(current):
                        at = _first_difference(found, bytes(current))
                        raise Violation(f"inode {number} reads otherwise than it was written, from {at} on")
                await asyncio.sleep(rng.random() * 0.1)
            await self._flush(content, current, share.flush(number), share, number)
        finally:
            with contextlib.suppress(OSError):
                await share.release(number)

    async def _change(self, share: Share, number: int, content: Content, current: bytearray) -> None:
        self._value = self._value % 250 + 1
        if self._rng.random() < 0.15:
            size = self._rng.randrange(SIZE_MAX)
            content.later.append((CUT, size, b""))
            await share.truncate(number, size)
            del current[size:]
            current += bytes(size - len(current))
            return
        at = self._rng.choice((len(current), self._rng.randrange(SIZE_MAX // 2)))
        data = bytes([self._value]) * self._rng.choice((1, 100, 700, 2500))
        data = data[: SIZE_MAX - at]
        if not data:
            return
        content.later.append((WROTE, at, data))
        await share.write(number, at, data)
        current += bytes(max(0, at - len(current)))
        current[at : at + len(data)] = data

    async def _flush(self, content: Content, current: bytearray, flush: Any, share: Share, number: int) -> None:
        """Now and then something is written while it is under way."""
        snapshot, before = bytes(current), len(content.later)
        flushing = self._spawn(flush)
        if self._rng.random() < 0.3:
            try:
                await self._change(share, number, content, current)
            except BaseException:
                flushing.add_done_callback(lambda done: done.cancelled() or done.exception())
                raise
        await flushing
        content.flushed, content.answered = snapshot, True
        del content.later[:before]
        self._known.answered += 1


class _Log:
    """Fails as one does that is at the other end of a socket: when something isn't taken, nothing is any more."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.ended = False

    def propose(self, change: Change) -> "_Proposed":
        if self.ended or not self._engine.may_serve:
            self.ended = True
            raise OSError(errno.EIO, "nothing is taken any more")
        return _Proposed(self, self._engine.propose_files(change))


class _Proposed:
    def __init__(self, log: _Log, proposal: Proposal) -> None:
        self._log, self._proposal = log, proposal

    @property
    def seq(self) -> int:
        return self._proposal.seq

    async def committed(self) -> None:
        try:
            await self._proposal.committed()
        except NotServing as error:
            self._log.ended = True
            raise OSError(errno.EIO, str(error)) from error
