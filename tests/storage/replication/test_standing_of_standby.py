"""When a standby may answer queries: complete, caught up, and hearing its primary now."""

from types import SimpleNamespace
from typing import Any

import pytest

from storage.control import Tell
from storage.replication.duty import Duty
from storage.replication.grants import Grants

CAUGHT_UP = {
    "leading": False,
    "joined": True,
    "linked": True,
    "whole": True,
    "whole_at": 50,
    "commit": 60,
    "read_from": 99.5,
    "missing": 3,
    "instances": 50,
}


def duty(isolated_reads: bool = False, **changes: Any) -> Duty:
    core: Any = SimpleNamespace(**{**CAUGHT_UP, **changes}, limits=SimpleNamespace(peer_timeout_s=1.5))
    core.rolled_forward, core.follow = core.leading, lambda **_: None
    core.grants = Grants()
    nothing: Any = None
    return Duty(
        core,
        clock=lambda: 100.0,
        persist_promise=nothing,
        abandon=nothing,
        flush=lambda: None,
        isolated_reads=isolated_reads,
    )


def test_follows() -> None:
    assert duty().follows


@pytest.mark.parametrize(
    "missing",
    [
        {"joined": False},
        {"linked": False},
        {"whole": False},
        {"leading": True},
        {"whole_at": None},
        {"commit": 49},  # it was away: what the primary had when it joined isn't all here yet
        {"missing": 26},  # a new node that has hardly anything yet
        {"read_from": 98.0},  # this process was stopped: what it reads now may have lain in a buffer
    ],
    ids=lambda change: next(iter(change)),
)
def test_does_not_follow(missing: dict[str, Any]) -> None:
    assert not duty(**missing).follows


@pytest.mark.parametrize("changes", [{}, {"leading": True, "epoch": 0}], ids=["standby", "primary"])
def test_a_node_that_hears_nobody_answers_readers_only_if_it_may(changes: dict[str, Any]) -> None:
    changes = {"epoch": 0, **changes}
    for isolated_reads in (False, True):
        alone = duty(isolated_reads, linked=False, **changes)
        assert not alone.may_read
        alone.tell(Tell("follow", etcd_ok=True))
        assert not alone.may_read
        alone.tell(Tell("follow", etcd_ok=False))
        assert alone.may_read == isolated_reads
    incomplete = duty(True, linked=False, whole=False, **changes)
    incomplete.tell(Tell("follow", etcd_ok=False))
    assert not incomplete.may_read
