"""What the process that serves the share and the gateway say to each other: MessagePack, each after its length."""

import asyncio
from typing import Final

import msgspec

from storage.files.peer import PeerState
from storage.state.file_model import Change

LENGTH_BYTES: Final = 4
MESSAGE_BYTES_MAX: Final = 4 << 20


class Begin(msgspec.Struct, frozen=True, tag="begin", array_like=True):
    """I am the one that changes the share from now on, or that shows it while this node is the standby."""


class Propose(msgspec.Struct, frozen=True, tag="propose", array_like=True):
    """Put this behind all others in the log."""

    change: Change


class Tell(msgspec.Struct, frozen=True, tag="tell", array_like=True):
    """Have the other node do that with its copies. `op`: a `peer.Told`."""

    session: int
    op: msgspec.Raw


class Ask(msgspec.Struct, frozen=True, tag="ask", array_like=True):
    """The same for a `peer.AskedFor`; `Said` answers."""

    token: int
    session: int
    op: msgspec.Raw


class Said(msgspec.Struct, frozen=True, tag="said", array_like=True):
    """What the other node answers, an encoded `peer.Answer`; nothing: the session has ended."""

    token: int
    answer: bytes


class PeerIs(msgspec.Struct, frozen=True, tag="peer", array_like=True):
    """From now on."""

    state: PeerState


class Begun(msgspec.Struct, frozen=True, tag="begun", array_like=True):
    """All that was ever proposed is in the catalogue. `writes`: this node is the primary, nobody else changes it."""

    catalogue: str  # folder
    volumes: tuple[str, ...]  # folders, also of those that aren't there now, but for those given up
    draining: tuple[str, ...]  # those of them on which nothing new is put
    reserve_bytes: int  # to be left free on each volume
    state_reserve_bytes: int  # to be left free where catalogue and log are
    log: str  # folder
    node: str  # this one's name
    peer: str  # the other one's, "" if there is none
    writes: bool
    complete: bool  # no volume was given up


class VolumesAre(msgspec.Struct, frozen=True, tag="volumes", array_like=True):
    """From now on; see `Begun`. `absent`: those that don't answer now, or aren't mounted."""

    volumes: tuple[str, ...]
    draining: tuple[str, ...]
    absent: tuple[str, ...]
    complete: bool


class Move(msgspec.Struct, frozen=True, tag="move", array_like=True):
    """Copies of a node are to leave the volumes on which nothing is put any more."""

    node: str
    numbers: tuple[int, ...]


class Committed(msgspec.Struct, frozen=True, tag="committed", array_like=True):
    """So many of what was proposed on this connection are committed, the last as entry `seq`."""

    count: int
    seq: int


class Ended(msgspec.Struct, frozen=True, tag="ended", array_like=True):
    """Nothing more is taken, and what isn't committed by now may never be. `why`: one line."""

    why: str


Message = Begin | Propose | Tell | Ask | Begun | VolumesAre | Move | Committed | PeerIs | Said | Ended
_decoder = msgspec.msgpack.Decoder(Message)
_encode = msgspec.msgpack.Encoder().encode


def frame(message: Message) -> bytes:
    raw = _encode(message)
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


async def next_message(reader: asyncio.StreamReader) -> Message:
    """Raises EOFError at the end, ValueError for what is no message."""
    head = await reader.readexactly(LENGTH_BYTES)
    length = int.from_bytes(head, "little")
    if length > MESSAGE_BYTES_MAX:
        raise ValueError(f"a message of {length} bytes")
    message: Message = _decoder.decode(await reader.readexactly(length))
    return message
