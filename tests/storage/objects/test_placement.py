"""Which volume takes a study: spread by room, a study together, no disk that works alone."""

import json
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from storage.objects.local_volume import create_marker
from storage.objects.placement import ACTIVE_S, least_loaded
from storage.objects.volume import NoRoom
from storage.objects.volumes import Volumes
from tests.builders import item
from tests.conftest import Gateway, wait_for
from tools.cli.dicom_client import Object


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def with_free(folder: Path, clock: Clock, *free: int) -> Volumes:
    """Volumes with so many GB free."""
    for number in range(len(free)):
        create_marker(folder / f"disk{number}")
    volumes = Volumes([folder / f"disk{number}" for number in range(len(free))], 0, clock=clock)
    for slot, gigabytes in zip(volumes.slots, free, strict=True):
        slot.free_bytes = gigabytes << 30
    return volumes


def numbers(volumes: Volumes, studies: range) -> Counter[int]:
    """How many of these studies each disk gets, by its number, that of the first being 0."""
    names = {slot.volume.id: number for number, slot in enumerate(volumes.slots) if slot.volume}
    return Counter(names[volumes.place(f"1.2.{study}").id] for study in studies)


def test_as_many_senders_work_on_as_many_disks(tmp_path: Path, clock: Clock) -> None:
    volumes = with_free(tmp_path, clock, *[500] * 8)
    assert numbers(volumes, range(8)) == dict.fromkeys(range(8), 1)
    assert numbers(volumes, range(8, 16)) == dict.fromkeys(range(8), 1)


def test_a_study_stays_where_it_is(tmp_path: Path, clock: Clock) -> None:
    volumes = with_free(tmp_path, clock, 500, 500, 500)
    first = volumes.place("1.2")
    for number in range(20):
        volumes.place(f"1.3.{number}")
        clock.now += 300
        assert volumes.place("1.2") is first


def test_a_new_disk_is_no_hot_spot_and_fills_up_sooner(tmp_path: Path, clock: Clock) -> None:
    volumes = with_free(tmp_path, clock, *[100] * 7, 4000)
    found = numbers(volumes, range(24))
    assert max(found.values()) == found[7]
    assert 4 <= found[7] <= 24 * 8 / 15  # it isn't the only one that works


def test_one_with_little_room_gets_less_and_a_full_one_nothing(tmp_path: Path, clock: Clock) -> None:
    volumes = with_free(tmp_path, clock, 0, 100, 1000, 1000, 10)
    found = numbers(volumes, range(30))
    assert 0 < found[1] < found[2]
    assert found[0] == found[4] == 0


def test_a_study_that_is_over_counts_no_more(tmp_path: Path, clock: Clock) -> None:
    volumes = with_free(tmp_path, clock, 500, 501)
    assert numbers(volumes, range(1)) == {1: 1}
    clock.now += ACTIVE_S + 1
    assert numbers(volumes, range(1, 2)) == {1: 1}
    assert numbers(volumes, range(2, 3)) == {0: 1}


def test_what_the_catalogue_knows_is_asked_for_once(tmp_path: Path, clock: Clock) -> None:
    volumes = with_free(tmp_path, clock, 500, 100, 500)
    there = volumes.slots[1].volume
    assert there is not None
    asked: list[str] = []

    def lies_on(study: str) -> str:
        asked.append(study)
        return there.id

    assert [volumes.place("1.2", lies_on) for _ in range(3)] == [there] * 3
    assert asked == ["1.2"]


def test_threads_that_place_a_study_at_once_agree(tmp_path: Path, clock: Clock) -> None:
    """The event loop and the thread that lands what was logged both come to a new study."""
    volumes = with_free(tmp_path, clock, *[500] * 8)
    together = threading.Barrier(8)

    def lies_on(_: str) -> str:
        together.wait(30)  # each of them has seen that the study is new
        return ""

    def place(study: int) -> str:
        return volumes.place(f"1.2.{study}", lies_on).id

    with ThreadPoolExecutor(8) as pool:
        for study in range(20):
            assert len({job.result() for job in [pool.submit(place, study) for _ in range(8)]}) == 1


def test_a_study_moves_on_when_its_disk_is_full(tmp_path: Path, clock: Clock) -> None:
    volumes = with_free(tmp_path, clock, 500, 400)
    assert numbers(volumes, range(1)) == {0: 1}
    volumes.slots[0].free_bytes = 0
    assert numbers(volumes, range(1)) == {1: 1}
    volumes.slots[1].free_bytes = 0
    with pytest.raises(NoRoom):
        volumes.place("1.2.0")


def test_a_study_stays_together_on_slow_disks(tmp_path: Path, clock: Clock) -> None:
    volumes = with_free(tmp_path, clock, 500, 500)
    for volume in volumes:
        volumes.took(volume.id, 1000.0)
    assert len({volumes.place("1.2").id for _ in range(6)}) == 1


def test_a_single_volume_without_any_room_left_is_not_divided_by() -> None:
    assert least_loaded({"a": 0}, {}) == "a"


@pytest.mark.parametrize("size", [2000, 700_000, 3_000_000])
def test_eight_senders_fill_eight_disks_each_study_together(
    tmp_path: Path, new_gateway: Callable[..., Gateway], size: int
) -> None:
    volumes = [tmp_path / f"disk{number}" for number in range(8)]
    for volume in volumes:
        create_marker(volume)
    gateway = new_gateway(TANDEM__STORAGE__VOLUMES=json.dumps([str(volume) for volume in volumes]))
    studies = [
        [item(StudyInstanceUID=f"1.2.3.{number}", PixelData=bytes(size)) for _ in range(4)] for number in range(8)
    ]

    def send(objects: list[Object]) -> list[int]:
        with gateway.client(*objects) as client:
            return [client.store(one) for one in objects]

    def files() -> list[list[Path]]:
        return [sorted((volume / "archive").rglob("*.dcm")) for volume in volumes]

    with ThreadPoolExecutor(8) as pool:
        assert [status for found in pool.map(send, studies) for status in found] == [0] * 32
    wait_for(lambda: sum(map(len, files())) == 32, "all files to be in the trees")
    assert list(map(len, files())) == [4] * 8
    assert all(len({file.parent.parent for file in found}) == 1 for found in files())
    gateway.stop()
    gateway.start()  # and so it stays
    assert send([item(StudyInstanceUID="1.2.3.5", PixelData=bytes(2000))]) == [0]
    wait_for(lambda: sum(map(len, files())) == 33, "the file to be in the tree")
    assert sorted(map(len, files())) == [4] * 7 + [5]
