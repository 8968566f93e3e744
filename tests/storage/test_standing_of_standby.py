"""When a standby may answer queries: complete, caught up, and hearing its primary now."""

from types import SimpleNamespace
from typing import Any

import pytest

from storage.duty import Duty

CAUGHT_UP = {
    "leading": False,
    "joined": True,
    "linked": True,
    "whole": True,
    "whole_at": 50,
    "commit": 60,
    "heard_at": 99.5,
}


def duty(**changes: Any) -> Duty:
    core = SimpleNamespace(**{**CAUGHT_UP, **changes}, limits=SimpleNamespace(peer_timeout_s=1.5))
    nothing: Any = None
    return Duty(core, clock=lambda: 100.0, persist_promise=nothing, abandon=nothing, flush=nothing)  # type: ignore[arg-type]


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
        {"heard_at": 98.0},  # this process was stopped, and doesn't know yet what it has missed
    ],
    ids=lambda change: next(iter(change)),
)
def test_does_not_follow(missing: dict[str, Any]) -> None:
    assert not duty(**missing).follows
