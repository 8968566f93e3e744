"""What stands in etcd below `/tandem/<cluster>/`, and how it is read. See the design, section 5.

state               StateValue, no lease            leader     node, with its lease
members/<node>      MemberValue, with a lease       reader     node, with its lease: who has the reading addresses
switchover          node wanted as primary          pause      nobody takes over by itself
released            epoch whose gateway is dead     history/<epoch>   what `tandem history` shows
maintenance/<node>  this node isn't to take over
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from ha.decide import Acquire, Bump, Change, Leader, State, Switchover, View
from ha.etcd import KeyValue
from storage.control import Member


class StateValue(msgspec.Struct, frozen=True):
    """`state` as it is written to etcd."""

    cluster_id: str
    epoch: int
    primary: str
    in_sync: tuple[Member, ...]
    nonce: str
    lineage: str = ""
    floor: int = 0


class MemberValue(msgspec.Struct, frozen=True):
    """What a node's agent says of itself while it is there."""

    node: str
    trouble: str = ""  # why it can't serve well
    version: str = ""
    features: int = 0  # of its gateway


@dataclass(frozen=True)
class Records:
    """All that was read at one time."""

    state: State | None = None
    leader: Leader | None = None
    reader: Leader | None = None
    switchover: Switchover | None = None
    paused: bool = False
    released: int = 0
    members: dict[str, MemberValue] = field(default_factory=dict)
    maintained: dict[str, float] = field(default_factory=dict)  # node -> since when, wall clock


def encode(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()


def read(found: dict[str, KeyValue], before: Records, now: float) -> Records:
    """`found`: key without its prefix -> value. `before` tells since when a switchover has been wanted."""
    members = {
        key.removeprefix("members/"): msgspec.json.decode(kv.value, type=MemberValue)
        for key, kv in found.items()
        if key.startswith("members/")
    }
    return Records(
        state=_state(found.get("state")),
        leader=_holder(found.get("leader")),
        reader=_holder(found.get("reader")),
        switchover=_switchover(found.get("switchover"), before.switchover, now),
        paused="pause" in found,
        released=int(found["released"].value) if "released" in found else 0,
        members=members,
        maintained={
            key.removeprefix("maintenance/"): _wall_clock(kv.value)
            for key, kv in found.items()
            if key.startswith("maintenance/")
        },
    )


def _wall_clock(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0  # by hand, perhaps; that it is there is what counts


def _state(kv: KeyValue | None) -> State | None:
    if kv is None:
        return None
    value = msgspec.json.decode(kv.value, type=StateValue)
    known = (value.cluster_id, value.epoch, value.primary, value.in_sync, value.nonce)
    return State(*known, kv.mod_revision, value.lineage, value.floor)


def _holder(kv: KeyValue | None) -> Leader | None:
    return None if kv is None else Leader(kv.value, kv.lease, kv.create_revision)


def _switchover(kv: KeyValue | None, before: Switchover | None, now: float) -> Switchover | None:
    if kv is None:
        return None
    if before is not None and before.revision == kv.mod_revision:
        return before
    return Switchover(kv.value, now, kv.mod_revision)


def chronicle(action: Acquire | Bump | Change, old: State, view: View, at: float) -> dict[str, Any]:
    """What `tandem history` shows of a change of epoch. `at`: wall clock, for people."""
    why = "switchover" if view.switchover else "takeover" if old.primary != view.node else "again"
    waited = view.now - view.leader_absent_since if view.leader_absent_since is not None else 0.0
    return {
        "epoch": old.epoch + 1,
        "primary": view.node,
        "before": old.primary,
        "by": "restart" if isinstance(action, Bump) else why,
        "in_sync": [member.node for member in action.in_sync],
        "leaderless_s": round(waited, 2),
        "at": at,
    }


class Takeover:
    """The parts of the last change of epoch, as they become known; times are seconds of CLOCK_BOOTTIME."""

    def __init__(self) -> None:
        self.row: dict[str, Any] = {}
        self.unwritten = False
        self._acquired_at = self._served_at = self._up_at = 0.0

    def begun(self, row: dict[str, Any], now: float, silent_since: float | None, absent_since: float | None) -> None:
        """This node leads in a new epoch. `silent_since`: when the other node's gateway was last heard."""
        self.row, self._acquired_at, self._served_at, self._up_at = dict(row), now, 0.0, 0.0
        parts: dict[str, Any] = {}
        if absent_since is not None:
            if silent_since is not None:
                parts["detect_s"] = round(max(0.0, absent_since - silent_since), 2)
            parts["fence_s"] = round(max(0.0, now - absent_since), 2)
        self.row["parts"] = parts

    @property
    def at(self) -> float:
        """Wall clock."""
        return float(self.row["at"])

    def look(self, view: View, site_up: bool, site_parts: dict[str, float]) -> None:
        """Take note of what has happened since; `unwritten` says whether there is something to write down."""
        gateway = view.gateway
        if not self.row or gateway is None or gateway.leading != self.row["epoch"] or not gateway.serving:
            return
        if not self._served_at:
            self._served_at = view.now
            self.row["parts"]["roll_forward_s"] = round(view.now - self._acquired_at, 2)
        if site_up and not self._up_at:
            self._up_at = view.now
            self.row["parts"] |= site_parts
            self.unwritten = True
        if self._up_at and gateway.answered_at > self._served_at and "first_success_s" not in self.row["parts"]:
            self.row["parts"]["first_success_s"] = round(max(0.0, gateway.answered_at - self._up_at), 2)
            self.unwritten = True
