"""What goes into and comes out of the replication core: roles, limits, and the effects its shell carries out."""

from dataclasses import dataclass
from enum import Enum

from storage.replication.messages import AnyMessage


class InvariantBroken(Exception):
    """The node must stop: going on could lose what was acknowledged."""


class Role(Enum):
    FOLLOWER = "follower"
    LEADER = "leader"


@dataclass(frozen=True)
class Limits:
    peer_timeout_s: float = 1.5
    ack_timeout_s: float = 10.0
    ping_interval_s: float = 0.2
    pause_s: float = 0.5  # between two ticks: more than that, and this node itself stood still
    grant_s: float = 2.0
    grant_margin_s: float = 0.2
    greet_again_s: float = 3.0
    window: int = 256
    state_after: int = 20_000  # a follower that isn't more entries behind takes the log


# Effects, to be carried out in order.


@dataclass(frozen=True)
class Send:
    message: AnyMessage


@dataclass(frozen=True)
class Transmit:
    """Send entries first..last (inclusive) as Prepare of this session, with this commit: what is committed already, the
    follower needn't have the bytes of before it acknowledges."""

    session: int
    first: int
    last: int
    commit: int


@dataclass(frozen=True)
class Persist:
    """Make this entry and its bytes durable, then call `persisted`. `owed`: it was committed without this node, whose
    copy of the bytes may come later."""

    seq: int
    entry_epoch: int
    entry: bytes
    stream: int
    owed: bool = False


@dataclass(frozen=True)
class Adopt:
    """Durably promise `epoch`, note `lineage` where none is known and drop the log after `match`, then call `adopted`
    with the first two. `state`: take the leader's state first, if that can be done."""

    epoch: int
    match: int
    lineage: str = ""
    state: bool = False


@dataclass(frozen=True)
class Publish:
    """Entries up to `seq` are committed: make them visible, then acknowledge them."""

    seq: int


@dataclass(frozen=True)
class SteppedDown:
    """This node stopped leading; what was proposed and not published has an unknown outcome."""

    promised: int


@dataclass(frozen=True)
class DropLink:
    reason: str


Effect = Send | Transmit | Persist | Adopt | Publish | SteppedDown | DropLink
