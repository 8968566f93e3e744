"""What the share's files need of the place where their bytes lie: the same of folders on a disk, and of memory, on
which the simulation runs."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.files.copies import CopyStore
from storage.files.local import LocalFiles
from storage.objects.volume import MARKER
from tests.simulation.copies import MemoryCopies
from tests.simulation.machine import Machine

SPACE = "0123abcd"
NewStore = Callable[[], CopyStore]


@pytest.fixture(params=["disk", "memory"])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> NewStore:
    """One that sees the same two volumes each time."""
    if request.param == "memory":
        machine = Machine("a", random.Random(1))

        def in_memory() -> CopyStore:
            return _named(MemoryCopies(machine, list(machine.disks)))

        return in_memory
    volumes = [tmp_path / name for name in ("first", "second")]
    for volume in volumes:
        volume.mkdir()
        (volume / MARKER).write_text("marker")
    return lambda: _named(LocalFiles(volumes, 0))


def _named(store: CopyStore) -> CopyStore:
    store.space = SPACE
    return store


def test_bytes_are_where_they_were_written(new_store: NewStore) -> None:
    made = new_store().create(0x12C4, "")
    made.write(b"hello", 3, 8)
    made.write(b"J", 3, 0)
    assert made.read(100, 0) == b"\0\0\0Jello"
    assert made.read(2, 3) == b"Je"
    made.truncate(10)
    assert made.read(100, 0) == b"\0\0\0Jello\0\0"
    made.cut(4)
    made.cut(9)
    assert made.found()[0] == 4
    made.sync()
    made.close()
    again = new_store().open(0x12C4, "", named=True)
    assert again is not None
    assert again.read(100, 0) == b"\0\0\0J"


def test_each_generation_is_a_copy_of_its_own(new_store: NewStore) -> None:
    store = new_store()
    for generation in ("", "5b1d0e77"):
        store.create(7, generation).write(generation.encode() or b"first", 0, 10)
    with pytest.raises(FileExistsError):
        store.create(7, "")
    found = store.open(7, "5b1d0e77", named=False)
    assert found is not None
    assert found.read(100, 0) == b"5b1d0e77"
    assert store.open(7, "other", named=False) is None
    assert [store.has(7, ""), store.has(7, "other"), store.has(8, "")] == [True, False, False]


def listed(store: CopyStore, part: int) -> list[tuple[int, str]]:
    return sorted((number, generation) for number, generation, _ in store.listing(part))


def test_what_is_removed_is_gone(new_store: NewStore) -> None:
    store = new_store()
    for number in (1, 2, 0x101):
        store.create(number, "")
    store.create(1, "0e77")
    assert listed(store, 1) == [(1, ""), (1, "0e77"), (257, "")]
    store.remove(1, "")
    store.remove(1, "")
    assert listed(store, 1) == [(1, "0e77"), (257, "")]
    assert store.listing(9) == []
    assert store.complete
