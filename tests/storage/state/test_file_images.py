"""Instances in the share's files: the catalogue has each as long as the bytes are there that were looked at,
whatever is done to the files and stored and deleted besides.
"""

import random

import pytest

from storage.state import file_images, file_rows, file_soundness
from storage.state.catalogue import Batch, Catalogue
from storage.state.file_images import is_of_file
from storage.state.file_model import ROOT, BeginWriting, Flush, Link, Make, MarkDirty, Remove, Rename
from storage.state.model import Delete, Entry, Files, IndexFile, Instance, Operation, Put
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
                number = self.file_of(uid)
                assert self.says[number] == uid and number in self.looked and not self.gone(number)
            else:  # deleted, or one of those that are left is looked at once more
                left = {number for number in self.looked - waiting if self.says[number] == uid}
                assert not [number for number in left if self.may_be_had(number)]
        assert self.catalogue.counts()["instances"] == sum(1 for uid in UIDS if self.catalogue.instance(uid))
        assert self.catalogue.counts()["bytes"] == sum(put_of(uid).length for uid in self.archived)

    def instances(self) -> list[Instance]:
        known = self.catalogue
        return [one for series, _ in known.series_of("1.2") for one in known.instances_of("1.2", series)]

    def file_of(self, uid: str) -> int:
        row = self.catalogue.instance(uid)
        with self.catalogue.kv.read() as txn:
            return (file_images.file_of(txn, row.seq) if row is not None else None) or 0

    def may_be_had(self, number: int) -> bool:
        """It is an instance that nobody has deleted since it was written."""
        with self.catalogue.kv.read() as txn:
            image, tombstone = file_images.image(txn, number), txn.get("tombstone", self.says[number].encode())
        return image is not None and tombstone is None


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
    assert world.file_of("1.2.1") == numbers[0]
    world.do(Files(Remove(ROOT, b"a", False, 1)))
    assert world.catalogue.instance("1.2.1") is None
    world.look()
    assert world.file_of("1.2.1") == numbers[1]


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


def test_a_number_means_the_same_bytes_for_ever() -> None:
    world = World()
    seen: set[int] = set()
    for uid in (*UIDS, *UIDS):
        number = world.write(ROOT, b"a", uid)
        world.close(number)
        world.look()
        row = world.catalogue.instance(uid)
        assert row is not None and row.seq not in seen
        with world.catalogue.kv.read() as txn:
            assert not [seq for seq in seen if file_images.file_of(txn, seq)]
        seen.add(row.seq)


def test_what_was_deleted_comes_back_when_the_file_is_written_to() -> None:
    world = World()
    first, second = (world.write(ROOT, name, "1.2.1") for name in (b"a", b"b"))
    world.close(first)
    world.look()
    world.close(second)  # waits
    world.do(Delete("1.2", "", "1.2.1", "why", "", 0.0))
    world.do(Files(Rename(ROOT, b"a", world.folder, b"a", 1)))
    world.look()
    assert world.catalogue.instance("1.2.1") is None and world.catalogue.is_deleted("1.2.1")
    world.do(Files(MarkDirty(first)))
    world.close(first)
    world.look()
    assert world.file_of("1.2.1") == first
    assert world.catalogue.is_deleted("1.2.1")  # of the archive, as which it may turn up on some disk


def test_a_second_name_and_the_folder_it_is_in() -> None:
    world = World()
    number = world.write(ROOT, b"a", "1.2.1")
    world.close(number)
    world.look()
    world.do(Files(Link(number, world.folder, b"b", 1)))
    assert [file.folders for file in world.unlooked()] == [(world.folder, ROOT)]
    assert world.file_of("1.2.1") == number  # until it was looked at


def test_a_study_is_deleted_file_by_file() -> None:
    """The rows above say nothing that only said who is gone."""
    world = World()
    for number in range(40):
        world.close(world.make(ROOT, b"%d" % number, 0o100644, dirty=True))
        file = world.unlooked()[0]
        keys = {"PatientID": "P", "StudyDescription": "CT" if number % 7 else "Thorax", "SeriesNumber": "1"}
        put = Put(f"1.2.3.{number}", "1.4", "1.2", f"1.2.{number % 3}", "1.5", bytes(16), 100, 60, keys, "", 1.0)
        world.do(IndexFile(file.number, file.since, put))
    for number in range(40):
        world.do(Files(Remove(ROOT, b"%d" % number, False, 1)))
        row = world.catalogue.study("1.2")
        left = world.instances()
        assert (row is not None) == bool(left)
        assert row is None or row.keys["StudyDescription"] in {one.put.keys["StudyDescription"] for one in left}
