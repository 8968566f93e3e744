"""A thread that a disk holds is left behind, and can't hide what holds its successor."""

import errno
from pathlib import Path

import pytest

from storage.objects.local_volume import create_marker
from storage.objects.volumes import Volumes
from storage.turns import LeftBehind, Turns


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    create_marker(tmp_path / "disk")
    return Volumes([tmp_path / "disk"], 0)


@pytest.fixture
def turns(volumes: Volumes, clock: Clock) -> Turns:
    return Turns(volumes, clock)


def test_what_holds_the_thread_is_told(turns: Turns, clock: Clock) -> None:
    assert turns.held(5.0) is None
    turns.at(0, "one")
    clock.now += 4
    assert turns.held(5.0) is None
    clock.now += 2
    assert turns.held(5.0) == "one"
    turns.done(0)
    assert turns.held(5.0) is None


def test_a_thread_that_was_left_behind_hides_nothing(turns: Turns, clock: Clock) -> None:
    turns.at(0, "one")
    clock.now += 6
    assert turns.next(5.0)
    turns.at(1, "two")
    clock.now += 6
    turns.done(0)
    with pytest.raises(LeftBehind):
        turns.at(0, "one")
    assert turns.held(5.0) == "two"


def test_a_thread_that_went_on_is_not_left(turns: Turns, clock: Clock) -> None:
    turns.at(0, "one")
    clock.now += 6
    turns.at(0, "two")
    assert not turns.next(5.0)
    turns.check(0)


def test_a_thread_that_commits_is_not_left(turns: Turns, clock: Clock) -> None:
    with turns.committing(0):
        clock.now += 6
        assert turns.held(5.0) == ""
        assert not turns.next(5.0)
    turns.check(0)


def test_the_late_error_of_a_disk_counts(turns: Turns, volumes: Volumes, clock: Clock) -> None:
    volume = next(iter(volumes))
    turns.at(0, volume.id)
    clock.now += 6
    assert turns.next(5.0)
    with pytest.raises(LeftBehind):
        turns.check(0, volume.id, OSError(errno.EIO, "Input/output error"))
    assert volumes.slots[0].failed
