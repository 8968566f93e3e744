"""What the HA agent and the gateway of one node say to each other, one JSON object a line on a Unix socket.

The agent sends `Tell`, the gateway `Report` on every change and a few times a second. Both are states, not events:
losing or repeating one does no harm. Times are seconds of CLOCK_BOOTTIME, which both processes share.
"""

import re
import time
from typing import Any, Final, Literal

import msgspec

NEVER: Final = float("-1e18")  # JSON has no infinity
LINE_BYTES_MAX: Final = 1 << 20


def boottime() -> float:
    """Seconds since boot, suspended time included: it goes on while this process is stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Member(msgspec.Struct, frozen=True):
    """A copy that is in sync: whose, which store, and which start of it."""

    node: str
    store_id: str
    incarnation: int


class Asked(msgspec.Struct, frozen=True):
    """The in-sync set that the gateway wants in force; `nonce` marks the write that does it."""

    members: tuple[str, ...]
    nonce: str


class Report(msgspec.Struct, frozen=True, tag="report"):
    """What the gateway says of itself."""

    store_id: str
    incarnation: int
    cluster_id: str
    promised: int
    leading: int  # epoch in which it leads or was told to lead, 0 if none
    serving: bool  # it has rolled forward and takes associations
    whole: bool
    last: tuple[int, int]
    linked: bool
    peer: Member | None
    peer_last: tuple[int, int] | None
    grant_until: float  # as leader: the peer won't be promoted before
    granted_until: float  # as follower: promised not to be promoted before
    withhold: bool
    asked: Asked | None
    fit: bool = True  # it has a disk to keep things on
    peer_whole: bool = True  # the linked peer's copy is whole, as far as is known
    busy: int = 0  # requests of clients that are under way
    pid: int = 0
    reads: bool = False  # it may answer queries: it serves, or is a complete standby that follows
    answered_at: float = NEVER  # when the first change of the present epoch was acknowledged, to a fraction of a second
    lineage: str = ""  # which log it holds, "" for none
    peer_promised: int = 0  # the linked peer's
    peer_leads: bool = False
    foreign: bool = False  # the linked peer's log is another one
    features: int = 0  # what this gateway can carry out
    commit: int = 0  # seq up to which every node in sync has the log
    missing: int = 0  # copies of this node that are to be made again
    peer_missing: int = 0  # the other node's, as far as is known


# Of users of the share: a name as useradd(8) has it, and a hash as hexadecimal digits.
USER_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
NT_HASH = re.compile(r"[0-9a-f]{32}")


class Tell(msgspec.Struct, frozen=True, tag="tell"):
    """What the agent wants the gateway to be."""

    role: Literal["lead", "follow", "hello"]  # hello: only report to me
    epoch: int = 0
    in_sync: tuple[str, ...] = ()
    serve_until: float = NEVER
    answered: str = ""  # nonce of the asked set that is in force
    withhold: bool = False
    drain: bool = False  # a switchover is near: take nothing new, end what is under way
    released: int = 0  # with "follow": whoever led in this epoch is dead for certain, promises to it bind no more
    resign: bool = False  # with "follow": address and share are down, the peer may take over at once
    cluster_id: str = ""
    lineage: str = ""  # which log the cluster has
    primary: str = ""  # this and the following for status only
    members: tuple[str, ...] = ()
    vips: tuple[str, ...] = ()
    share: bool = False
    etcd_ok: bool = False
    trouble: str = ""
    alarms: tuple[str, ...] = ()  # what somebody should look at
    follow: dict[str, str] = {}  # what follows the address, and how it is


class Clients(msgspec.Struct, frozen=True, tag="clients"):
    """TCP connections to the virtual addresses, from the agent of the node that has them to that of the other one."""

    connections: tuple[tuple[str, int, str, int], ...]  # client's address and port, our address and port


class StatusRequest(msgspec.Struct, frozen=True, tag="status"):
    pass


class StatusReply(msgspec.Struct, frozen=True, tag="status-reply"):
    status: dict[str, Any]


class Order(msgspec.Struct, frozen=True, tag="order"):
    """Something an operator wants done: the name of a service and what it needs."""

    name: str
    given: dict[str, Any] = {}


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How far an order has come; any number of these precede its answer."""

    done: int
    of: int


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """`error` is one line for the operator, "" if all went well."""

    result: dict[str, Any] = {}
    error: str = ""


Line = Report | Tell | Clients | StatusRequest | StatusReply | Order | Progress | Answer
_decoder = msgspec.json.Decoder(Line)


def encode_line(message: Line) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def decode_line(line: bytes) -> Line:
    """Raises msgspec.DecodeError for anything else."""
    message: Line = _decoder.decode(line)
    return message
