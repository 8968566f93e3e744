"""A program that works on the share's names, and what it knows of them.

It makes, renames, replaces, links and removes, several at once. What was answered is there for ever after, on whichever
node leads; of what wasn't, a beginning in the order in which it was asked for, and nothing else.
"""

import asyncio
import contextlib
import stat
from collections.abc import Callable
from typing import Any, Final

from storage.engine import Engine
from storage.files.namespace import Namespace, Proposal
from storage.ingest import NotServing
from storage.state import file_images, file_rows, file_soundness, instances
from storage.state.file_images import file_of
from storage.state.file_model import (
    ROOT,
    BeginWriting,
    Change,
    Drop,
    Flush,
    Link,
    Make,
    MarkDirty,
    Remove,
    Rename,
    SetAttributes,
    SetXattr,
)
from storage.state.file_rows import FileRefused
from storage.state.files import apply
from storage.state.kv import KeyValues, Transaction
from storage.state.model import IndexFile, Put
from tests.simulation.machine import MemoryKv
from tests.simulation.world import Violation, World

NAMES: Final = (b"a", b"b", b"c", b"d", b"A")
IMAGES: Final = ("9.1", "9.2", "9.3", "9.4")  # SOP Instance UIDs that files have
LOOKS: Final = 4  # in one world of so many somebody looks at files
AT_ONCE_MAX: Final = 5
FOLDERS_DEEP: Final = 3

Rows = dict[str, list[tuple[bytes, bytes]]]


def rows_of(txn: KeyValues) -> Rows:
    return {table: list(txn.scan(table)) for table in file_rows.TABLES}


def images_of(txn: Transaction) -> Rows:
    """What the catalogue has of the files. Raises Violation for what they don't say any more."""
    for uid in IMAGES:
        one = instances.get(txn, instances.key_of(uid))
        number = file_of(txn, one.seq) if one is not None else None
        if one is not None and one.put.keys["PatientID"] != str(file_rows.inode(txn, number or 0).mtime):
            raise Violation(f"the catalogue has {uid} as it was before inode {number} was written to")
    return {table: list(txn.scan(table)) for table in file_images.TABLES}


class Known:
    """What was answered, and in order behind it what wasn't yet."""

    def __init__(self) -> None:
        self._kv = MemoryKv()
        self._open: list[Change] = []
        self._lost: list[Change] = []  # what a later leader didn't have
        self.answered = 0

    def asked(self, change: Change) -> None:
        self._open.append(change)

    def done(self, change: Change) -> None:
        """It was answered, so all before it is there as well."""
        if any(one is change for one in self._lost):
            raise Violation(f"A: {change} was answered, and wasn't there when another node took over")
        self.answered += 1
        while any(one is change for one in self._open):
            self._carry_out(self._open.pop(0))

    def _carry_out(self, change: Change) -> None:
        self._kv.update(lambda txn: apply(txn, change))

    def took_over(self, found: Rows, node: str) -> None:
        """What a new leader has."""
        if not self._is_beginning(found):
            raise Violation(f"A: the names on node {node} aren't what was answered, and a beginning of the rest")
        self._lost += self._open
        self._open.clear()

    def _is_beginning(self, found: Rows) -> bool:
        while True:
            with self._kv.read() as txn:
                if rows_of(txn) == found:
                    return True
            if not self._open:
                return False
            self._carry_out(self._open.pop(0))

    def final(self, first: Rows, second: Rows) -> None:
        if first != second:
            tables = [table for table in first if first[table] != second[table]]
            raise Violation(f"D: the nodes have different rows in {tables}")
        self.took_over(first, "a")


class ShareProgram:
    """On one node, while that leads."""

    def __init__(self, world: World, known: Known, engine: Engine, node: str, spawn: Callable[[Any], None]) -> None:
        self._world, self._rng, self._known = world, world.rng, known
        self._engine, self._node, self._spawn = engine, node, spawn
        self._at = 0
        self._under_way = 0

    async def run(self) -> None:
        while not self._world.calm:
            with contextlib.suppress(NotServing):
                await self._engine.settle_files()
                await self._work(Namespace(self._engine.catalogue.kv, self._engine.propose_files))
            await asyncio.sleep(0.1 + self._rng.random())

    async def _work(self, namespace: Namespace) -> None:
        """Until this node leads no more, or something isn't answered."""
        found = namespace.look(rows_of)
        self._check_sound()
        self._known.took_over(found, self._node)
        self._failed = False
        self._propose(namespace, BeginWriting("sim"))
        for number in namespace.look(file_rows.orphans):
            self._propose(namespace, Drop(number))
        if self._world.seed % LOOKS == 2:
            self._spawn(self._look_on())
        while not self._failed and not self._world.calm:
            for _ in range(self._rng.randrange(AT_ONCE_MAX)):
                if self._under_way < AT_ONCE_MAX:
                    self._ask(namespace)
            await asyncio.sleep(self._rng.random() * 0.2)

    def _check_sound(self) -> None:
        with self._engine.catalogue.kv.read() as txn:
            for what in file_soundness.broken(txn):
                raise Violation(f"the share's rows on node {self._node}: {what}")

    def _ask(self, namespace: Namespace) -> None:
        change = namespace.look(self._choose)
        if change is not None:
            with contextlib.suppress(FileRefused):
                self._propose(namespace, change)

    def _propose(self, namespace: Namespace, change: Change) -> None:
        _, proposal = namespace.change(change)
        self._known.asked(change)
        self._under_way += 1
        self._spawn(self._wait(change, proposal))

    async def _look(self) -> None:
        """At the files that nobody has looked at; each says when it was written to last."""
        with self._engine.catalogue.kv.read() as txn:
            files = list(file_images.unlooked(txn))
        for file in files:
            uid = self._rng.choice(IMAGES)
            keys = {"PatientID": str(file.mtime)}
            put = Put(uid, "1.4", "9", "9.0", "1.2.1", bytes(16), file.size, 1, keys, "", 0.0)
            await asyncio.sleep(self._rng.random() * 0.5)
            if self._failed or self._world.calm:
                return
            with contextlib.suppress(NotServing):
                await self._engine.ingest.index_file(
                    IndexFile(file.number, file.since, put if self._rng.random() < 0.8 else None)
                )

    async def _look_on(self) -> None:
        while not self._failed and not self._world.calm:
            await self._look()
            await asyncio.sleep(self._rng.random())

    async def _wait(self, change: Change, proposal: Proposal) -> None:
        try:
            await proposal.committed()
        except NotServing:
            self._failed = True
            return
        finally:
            self._under_way -= 1
        self._known.done(change)

    def _choose(self, rows: KeyValues) -> Change | None:
        rng = self._rng
        self._at += 1
        folder, deep = ROOT, 0
        here = list(file_rows.listed(rows, folder))
        while here and deep < FOLDERS_DEEP and rng.random() < 0.5:
            one = rng.choice(here).inode
            if not stat.S_ISDIR(file_rows.inode(rows, one).mode):
                break
            folder, deep = one, deep + 1
            here = list(file_rows.listed(rows, folder))
        name = rng.choice(here).name if here and rng.random() < 0.7 else rng.choice(NAMES)
        known = file_rows.find(rows, folder, name)
        orphans = file_rows.orphans(rows)
        held = rng.random() < 0.3
        choice = rng.random()
        if orphans and choice < 0.1:
            return Drop(rng.choice(orphans))
        if known is None or choice < 0.2:
            kind = stat.S_IFDIR if rng.random() < 0.3 and deep < FOLDERS_DEEP else stat.S_IFREG
            return Make(folder, rng.choice(NAMES), kind | 0o644, 0, 0, self._at)
        if choice < 0.4:
            return Remove(folder, name, rng.random() < 0.3, self._at, held)
        if choice < 0.45:
            return MarkDirty(known.inode)
        if choice < 0.5:
            return Flush(known.inode, self._at, self._at, self._at, rng.random() < 0.5)
        if choice < 0.7:
            to, exchange = rng.choice((ROOT, folder)), rng.random() < 0.2
            return Rename(folder, name, to, rng.choice(NAMES), self._at, exchange=exchange, held=held)
        if choice < 0.8:
            return Link(known.inode, ROOT, rng.choice(NAMES), self._at)
        if choice < 0.9:
            return SetXattr(known.inode, b"user.DOSATTRIB", b"%d" % self._at, self._at)
        return SetAttributes(known.inode, self._at, mode=rng.choice((0o600, 0o644)))
