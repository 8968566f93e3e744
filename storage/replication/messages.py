"""What two nodes say to each other about the log. Bulk bytes travel beside these, see `link.py`."""

import msgspec

FEATURES = 7  # grows with what a node can carry out; what the other node can't isn't asked of it
PLACES_STREAMS = 3  # from here on it takes the study of an object that is on its way
# From here on it acknowledges old entries without their bytes and says up to where it counts them, takes the state
# where it is far behind, and knows the entry that has both nodes forget what is over.
TAKES_STATE = 4
KNOWS_FILES = 6  # from here on it knows the share's files, and keeps copies of their bytes
MOVES_FILES = 7  # from here on it moves copies of the other node's that are to leave a volume


class Message(msgspec.Struct, frozen=True, tag=True):
    pass


class Hello(Message, frozen=True):
    """Who I am and what I hold. A leader's carries its session; a follower's repeats the session it answers."""

    cluster: str
    node: str
    store_id: str
    incarnation: int
    promised: int
    leading: bool
    session: int
    epochs: tuple[tuple[int, int], ...]
    commit: int
    whole: bool
    lineage: str = ""  # which log it is, "" for an empty one
    features: int = 0  # of the node that says so, see FEATURES


class Welcome(Message, frozen=True):
    """Leader to follower: cut your log after `match`, then follow me. `commit` is what a whole copy must reach.
    `state`: you are far behind; take my state, if you can, and what my log has behind it. `must`: you can't do without
    it, since the log has forgotten what you haven't heard of."""

    epoch: int
    session: int
    match: int
    commit: int
    lineage: str = ""
    state: bool = False
    must: bool = False

    @property
    def of(self) -> tuple[int, int]:
        return self.epoch, self.session


class Joined(Message, frozen=True):
    epoch: int
    session: int
    seq: int


class Prepare(Message, frozen=True):
    """One entry to make durable. `stream` names bytes already sent on this link, 0 if they must be fetched."""

    epoch: int
    session: int
    seq: int
    entry_epoch: int
    commit: int
    entry: bytes
    stream: int


class Ack(Message, frozen=True):
    """Every entry up to `seq` is durable here, and the bytes of those that weren't committed without this node."""

    epoch: int
    session: int
    seq: int


class Ping(Message, frozen=True):
    """A node's heartbeat; `sent_s` is its own clock and comes back unread. `echo_s`, a leader's, is the `at_s` of the
    last Pong: the follower then knows that this leader led after that moment of its own clock."""

    epoch: int
    session: int
    commit: int
    sent_s: float
    echo_s: float = float("-inf")
    missing: int = 0  # copies that the sender lacks,
    counted: int = 0  # of all entries up to here
    adopting: int = 0  # session of the Welcome that the sender is about to carry out
    leads: bool | None = None  # the sender does now; older versions don't say it


class Pong(Message, frozen=True):
    """Answer to Ping. `grant`: I won't promote for `grant_s` from now. `info`: this node's volumes, for status."""

    epoch: int
    session: int
    sent_s: float
    grant: bool
    whole: bool
    epochs_last: tuple[int, int]
    info: bytes
    at_s: float = float("-inf")  # the follower's own clock; comes back unread


class Resign(Message, frozen=True):
    """Leader to follower: I have stopped; nothing that you promised in this session binds you any more."""

    epoch: int
    session: int


class Deny(Message, frozen=True):
    """You are of an old epoch; I promised `promised`."""

    promised: int


AnyMessage = Hello | Welcome | Joined | Prepare | Ack | Ping | Pong | Resign | Deny

_decoder = msgspec.msgpack.Decoder(AnyMessage)
encode = msgspec.msgpack.Encoder().encode


def decode(data: bytes | bytearray | memoryview) -> AnyMessage:
    """Raises msgspec.DecodeError for anything that isn't one of ours."""
    message: AnyMessage = _decoder.decode(data)
    return message
