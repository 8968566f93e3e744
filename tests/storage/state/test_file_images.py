"""Instances in the share's files: the catalogue has each as long as the bytes are there that were looked at,
whatever is done to the files and stored and deleted besides.
"""

import random

import pytest

from storage.state import file_images, file_rows, file_soundness
from storage.state.catalogue import Batch, Catalogue
from storage.state.file_images import file_of, is_of_file, seq_of
from storage.state.file_model import ROOT, BeginWriting, Flush, Link, Make, MarkDirty, Remove, Rename
from storage.state.model import Delete, Entry, Files, IndexFile, Operation, Put
from tests.simulation.machine import MemoryKv

UIDS = ("1.2.1", "1.2.2", "1.2.3")
NAMES = (b"a", b"b", b"c", b"d")
DONE = ["written", "closed", "looked", "looked late", "removed", "renamed", "linked", "stored", "deleted"]


class World:
    def __init__(self) -> None:
        self.catalogue = Catalogue(MemoryKv())
        self.seq = 0
        self.says: dict[int, str] = {}  # what lies in each file
        self.looked: set[int] = set()  # and what was seen there is in the catalogue, unless something went before it
        self.archived: set[str] = set()
        self.do(Files(BeginWriting("x")))
        self.folder = self.make(ROOT, b"folder", 0o40755)

    def do(self, operation: Operation) -> None:
        self.seq += 1
        entry = Entry(1, self.seq, operation)
        self.catalogue.write(Batch(appends=[(entry, None)]))
        self.catalogue.write(Batch(applies=[(entry, None)]))

    def make(self, parent: int, name: bytes, mode: int, *, dirty: bool = False) -> int:
        with self.catalogue.kv.read() as txn:
            number = file_rows.next_number(txn)
        self.do(Files(Make(parent, name, mode, 0, 0, 1, dirty=dirty)))
        return number

    def named(self, parent: int, name: bytes) -> int:
        with self.catalogue.kv.read() as txn:
            found = file_rows.find(txn, parent, name)
        return found.inode if found else 0

    def gone(self, number: int) -> bool:
        with self.catalogue.kv.read() as txn:
            return file_rows.is_gone(txn, number)

    def write(self, parent: int, name: bytes, uid: str) -> int:
        number = self.named(parent, name)
        if number:
            self.do(Files(MarkDirty(number)))
        else:
            number = self.make(parent, name, 0o100644, dirty=True)
        self.says[number] = uid
        self.looked.discard(number)
        return number

    def close(self, number: int) -> None:
        self.do(Files(Flush(number, 10, self.seq, self.seq, clean=True)))
        self.looked.discard(number)

    def look(self, late: int = 0) -> None:
        for file in self.unlooked():
            uid = self.says[file.number]
            put = put_of(uid) if uid else None
            self.do(IndexFile(file.number, file.since - late, put))
            if not late:
                self.looked.add(file.number)

    def unlooked(self) -> list[file_images.Unlooked]:
        with self.catalogue.kv.read() as txn:
            return list(file_images.unlooked(txn))

    def check(self) -> None:
        with self.catalogue.kv.read() as txn:
            assert not list(file_soundness.broken(txn))
        waiting = {file.number for file in self.unlooked()}
        for uid in UIDS:
            row = self.catalogue.instance(uid)
            if uid in self.archived:
                assert row is not None and not is_of_file(row.seq)
            elif row is not None:
                number = file_of(row.seq)
                assert self.says[number] == uid and number in self.looked and not self.gone(number)
            else:  # deleted, or one of those that are left is looked at once more
                left = {number for number in self.looked - waiting if self.says[number] == uid}
                assert not [number for number in left if self.image(number)]
        assert self.catalogue.counts()["instances"] == sum(1 for uid in UIDS if self.catalogue.instance(uid))
        assert self.catalogue.counts()["bytes"] == sum(put_of(uid).length for uid in self.archived)

    def image(self, number: int) -> bool:
        with self.catalogue.kv.read() as txn:
            return file_images.image(txn, number) is not None


def put_of(uid: str) -> Put:
    return Put(uid, "1.4", "1.2", "1.2.0", "1.5", bytes(16), 100, 60, {}, "", 1.0)


@pytest.mark.parametrize("seed", range(60))
def test_the_catalogue_has_what_lies_in_the_files(seed: int) -> None:
    rng, world = random.Random(seed), World()
    for _ in range(60):
        parent, name = rng.choice((ROOT, world.folder)), rng.choice(NAMES)
        number = world.named(parent, name)
        match rng.choice(DONE):
            case "written":
                number = world.write(parent, name, rng.choice((*UIDS, "")))
                if rng.random() < 0.8:
                    world.close(number)
            case "closed" if number:
                world.close(number)
            case "looked":
                world.look()
            case "looked late":
                world.look(late=1)
            case "removed" if number:
                world.do(Files(Remove(parent, name, False, 1)))
            case "renamed" if number:
                world.do(Files(Rename(parent, name, rng.choice((ROOT, world.folder)), rng.choice(NAMES), 1)))
            case "linked" if number:
                world.do(Files(Link(number, ROOT, rng.choice(NAMES), 1)))
            case "stored":
                uid = rng.choice(UIDS)
                world.do(put_of(uid))
                world.archived.add(uid)
            case "deleted":
                uid = rng.choice(UIDS)
                world.do(Delete("1.2", "", uid, "", "", 0.0))
                world.archived.discard(uid)
        world.check()


def test_one_of_the_others_takes_its_place() -> None:
    world = World()
    numbers = [world.write(ROOT, name, "1.2.1") for name in (b"a", b"b")]
    for number in numbers:
        world.close(number)
    world.look()
    row = world.catalogue.instance("1.2.1")
    assert row is not None and row.seq == seq_of(numbers[0])
    world.do(Files(Remove(ROOT, b"a", False, 1)))
    assert world.catalogue.instance("1.2.1") is None
    world.look()
    row = world.catalogue.instance("1.2.1")
    assert row is not None and row.seq == seq_of(numbers[1])


def test_what_was_written_to_while_it_was_looked_at_counts_for_nothing() -> None:
    world = World()
    number = world.write(ROOT, b"a", "1.2.1")
    world.close(number)
    file = world.unlooked()[0]
    world.write(ROOT, b"a", "1.2.2")
    world.do(IndexFile(file.number, file.since, put_of("1.2.1")))
    assert world.catalogue.instance("1.2.1") is None
    world.close(number)
    world.do(IndexFile(file.number, file.since, put_of("1.2.1")))
    assert world.catalogue.instance("1.2.1") is None
    world.look()
    assert world.catalogue.instance("1.2.2") is not None
