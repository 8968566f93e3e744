"""What the node whose share is written to has the other one do with its copies, and what that answers.

All of it belongs to a session: one leader, followed on one link. In a session each file is begun before anything else
is said of it; from then on what is written here is told there, in the same order, so a sync that succeeds there makes
the two copies alike. What was told in a session that ended may be there or not, so a file is begun anew.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

BLOCKS_AT_ONCE: Final = 16


class Create(msgspec.Struct, frozen=True, tag="create", array_like=True):
    """Begin a file that was just made: its copy is empty, whatever is there."""

    space: str  # name of the inode numbers
    inode: int


class Begin(msgspec.Struct, frozen=True, tag="begin", array_like=True):
    """Begin a file whose copy is the same as this node's, of this length."""

    space: str
    inode: int
    copy: str  # its generation
    size: int


class Renew(msgspec.Struct, frozen=True, tag="renew", array_like=True):
    """Begin a file whose copy may be another one, or none: it gets this length, and will be told what differs. What
    can't be found or not be written to any more, or is to leave its volume, is made anew as `spare`. Answered with
    `Renewed`."""

    space: str
    inode: int
    copy: str
    spare: str  # generation of a copy that nobody has
    size: int


class Write(msgspec.Struct, frozen=True, tag="write", array_like=True):
    inode: int
    at: int
    data: bytes


class Cut(msgspec.Struct, frozen=True, tag="cut", array_like=True):
    """truncate(2)"""

    inode: int
    size: int


class Sync(msgspec.Struct, frozen=True, tag="sync", array_like=True):
    """Make durable all that was told of it. Answered with `Synced`."""

    inode: int


class End(msgspec.Struct, frozen=True, tag="end", array_like=True):
    """Nothing more is said of it in this session."""

    inode: int


class Compare(msgspec.Struct, frozen=True, tag="compare", array_like=True):
    """Answered with `Blocks`: those from `first` on, `BLOCKS_AT_ONCE` at most."""

    space: str
    inode: int
    copy: str
    first: int


class Fetch(msgspec.Struct, frozen=True, tag="fetch", array_like=True):
    """Answered with `Fetched`."""

    space: str
    inode: int
    copy: str
    at: int
    size: int


Told = Create | Begin | Write | Cut | End
AskedFor = Renew | Sync | Compare | Fetch
Op = Told | AskedFor


class Renewed(msgspec.Struct, frozen=True, tag="renewed", array_like=True):
    copy: str  # the one that is written to from now on


class Synced(msgspec.Struct, frozen=True, tag="synced", array_like=True):
    pass


class Blocks(msgspec.Struct, frozen=True, tag="blocks", array_like=True):
    size: int  # bytes of the whole copy
    digests: tuple[bytes, ...]  # xxh3-128 of each block, see `copies.digest_of`


class Fetched(msgspec.Struct, frozen=True, tag="fetched", array_like=True):
    data: bytes


class Failed(msgspec.Struct, frozen=True, tag="failed", array_like=True):
    """It can't: the copy isn't what was told."""

    why: str


Answer = Renewed | Synced | Blocks | Fetched | Failed

_encode = msgspec.msgpack.Encoder().encode
_op_decoder = msgspec.msgpack.Decoder(Op)
_answer_decoder = msgspec.msgpack.Decoder(Answer)


def encode(message: Op | Answer) -> bytes:
    return _encode(message)


def decode_op(raw: bytes | bytearray | memoryview | msgspec.Raw) -> Op:
    """Raises msgspec.DecodeError."""
    found: Op = _op_decoder.decode(raw)
    return found


def decode_answer(raw: bytes | bytearray | memoryview | msgspec.Raw) -> Answer:
    """Raises msgspec.DecodeError."""
    found: Answer = _answer_decoder.decode(raw)
    return found


class PeerLost(Exception):
    """The session has ended; what was told in it last may be there or not."""


class PeerState(msgspec.Struct, frozen=True, array_like=True):
    """`session`: in which the other node follows, 0 while it doesn't. `required`: it is in sync, so what is flushed
    has to be on both."""

    session: int
    required: bool


class Asking:
    """How the other node was known to be last, and what it was asked in that session."""

    def __init__(self, state: PeerState) -> None:
        self.state = state
        self._changed = asyncio.Event()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._last_token = 0

    def is_now(self, state: PeerState) -> bool:
        """Returns whether the session is another one; then nothing that was asked is answered any more."""
        before, self.state = self.state, state
        if state.session != before.session:
            waiting, self._waiting = self._waiting, {}
            for answer in waiting.values():
                if not answer.done():
                    answer.set_exception(PeerLost())
                    answer.exception()  # whoever waits sees it too
        self._changed.set()
        self._changed = asyncio.Event()
        return state.session != before.session

    async def change(self) -> None:
        """Wait until it is another state, or the same again."""
        await self._changed.wait()

    async def ask(self, send: Callable[[int], bool]) -> bytes:
        """The encoded answer to what `send(token)` sends, which says whether it could. Raises PeerLost."""
        self._last_token += 1
        token, answer = self._last_token, asyncio.get_running_loop().create_future()
        self._waiting[token] = answer
        try:
            if not send(token):
                raise PeerLost
            found: bytes = await answer
            return found
        finally:
            self._waiting.pop(token, None)

    def answered(self, token: int, answer: bytes) -> None:
        waiting = self._waiting.get(token)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)


@dataclass(frozen=True)
class Pair:
    """The names of this node and of the other one, "" if there is none."""

    node: str
    peer: str


class Peer(Protocol):
    """The other node, as who writes on this one sees it."""

    @property
    def state(self) -> PeerState: ...
    def tell(self, session: int, op: Told) -> None:
        """Nothing comes of it if the session has ended."""
        ...

    async def room(self) -> None:
        """Wait until what was told is taken, but for a bounded rest."""
        ...

    async def ask(self, session: int, op: AskedFor) -> Answer:
        """Raises PeerLost; the state is another one then."""
        ...

    async def changed(self, before: PeerState) -> None:
        """Wait until the state isn't that. Raises OSError if it never will be."""
        ...
