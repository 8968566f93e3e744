"""The two nodes' ends of what `peer.py` names: the leader's tells and asks, the follower's carries out. It goes over
the connection of the log's entries, and belongs to the same session as they."""

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec

from storage.files.keeper import Keeper
from storage.files.peer import (
    Answer,
    AskedFor,
    Asking,
    PeerState,
    Told,
    decode_answer,
    decode_op,
    encode,
)
from storage.replication.link import Kind
from storage.replication.messages import KNOWS_FILES, MOVES_FILES
from storage.replication.peering import Peering
from storage.replication.replica import Replica
from storage.state.file_model import Change, Lacks

WINDOW_BYTES: Final = 16 << 20  # told, and not carried out yet
NONE: Final = PeerState(0, required=False)


class Said(msgspec.Struct, frozen=True, array_like=True):
    """An operation, and whose."""

    epoch: int
    session: int
    op: msgspec.Raw


_decode = msgspec.msgpack.Decoder(Said).decode
_encode = msgspec.msgpack.Encoder().encode


class Mirror:
    """See `Peer` for what a leader may call."""

    def __init__(self, core: Replica, peering: Peering, keeper: Keeper) -> None:
        self._core, self._peering, self.keeper = core, peering, keeper
        self._asking = Asking(NONE)
        self._untaken = 0
        self._room = asyncio.Event()
        self._followed = (0, 0)  # epoch and session of what was carried out last
        self.propose: Callable[[Change], object] = lambda change: None  # puts it in the log, if this node leads
        self.on_move: Callable[[str, list[int]], bool] = lambda node, numbers: False  # see `leave`
        peering.on_file = self._frame

    # -- leader ----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> PeerState:
        self.look()
        return self._asking.state

    def look(self) -> None:
        """To be called when the core has changed."""
        state = self._now()
        if state != self._asking.state and self._asking.is_now(state):
            self._untaken = 0
            self._room.set()

    def _now(self) -> PeerState:
        core = self._core
        if not core.leading or core.peer is None:
            return NONE
        hello = core.peer_hello
        follows = core.joined and self._peering.link is not None and hello is not None
        knows = hello is not None and hello.features >= KNOWS_FILES
        return PeerState(core.session if follows and knows else 0, core.peer in core.in_sync.required)

    async def changed(self, before: PeerState) -> None:
        while self.state == before:
            await self._asking.change()

    def tell(self, session: int, op: Told) -> None:
        self.tell_raw(session, msgspec.Raw(encode(op)))

    def tell_raw(self, session: int, op: msgspec.Raw) -> None:
        if self._send(session, 0, op):
            self._untaken += len(memoryview(op))
            if self._untaken > WINDOW_BYTES:
                self._room.clear()

    async def room(self) -> None:
        await self._room.wait()

    async def ask(self, session: int, op: AskedFor) -> Answer:
        return decode_answer(await self.ask_raw(session, msgspec.Raw(encode(op))))

    async def ask_raw(self, session: int, op: msgspec.Raw) -> bytes:
        """The encoded answer. Raises PeerLost."""
        return await self._asking.ask(lambda token: self._send(session, token, op))

    def _send(self, session: int, token: int, op: msgspec.Raw) -> bool:
        link = self._peering.link
        if session == 0 or self.state.session != session or link is None:
            return False
        link.send(Kind.FILE, token, _encode(Said(self._core.epoch, session, op)))
        return True

    # -- both ends of the link -------------------------------------------------------------------------------------

    def _frame(self, kind: Kind, token: int, payload: bytearray) -> None:
        """Raises msgspec.DecodeError."""
        if kind is Kind.FILE:
            self._take(token, payload)
        elif kind is Kind.FILE_LOST:
            self._note_lacking(str(self._core.peer), msgspec.msgpack.decode(payload, type=list[int]))
        elif kind is Kind.FILE_MOVE:
            self.on_move(str(self._core.peer), msgspec.msgpack.decode(payload, type=list[int]))
        elif kind is Kind.FILE_ANSWER:
            self._asking.answered(token, bytes(payload))
            self._peering.on_progress()
        elif token == self._asking.state.session:
            self._untaken -= int.from_bytes(payload, "big")
            self._peering.on_progress()  # it is slow, not stuck
            if self._untaken <= WINDOW_BYTES:
                self._room.set()

    # -- either ----------------------------------------------------------------------------------------------------

    def lost(self, numbers: list[int]) -> None:
        """This node doesn't hold what it should of these files."""
        if self._core.leading:
            self._note_lacking(self._core.node, numbers)
        else:
            self._send_numbers(Kind.FILE_LOST, numbers, KNOWS_FILES)

    def leave(self, numbers: list[int]) -> bool:
        """This node's copies of these files are to leave volumes on which nothing is put any more. Returns whether
        somebody may see to that: the share's writer, on whichever node."""
        if self._core.leading:
            return self.on_move(self._core.node, numbers)
        return self._send_numbers(Kind.FILE_MOVE, numbers, MOVES_FILES)

    def _send_numbers(self, kind: Kind, numbers: list[int], features: int) -> bool:
        hello, link = self._core.peer_hello, self._peering.link
        if link is None or hello is None or hello.features < features:
            return False
        link.send(kind, 0, _encode(numbers))
        return True

    def _note_lacking(self, node: str, numbers: list[int]) -> None:
        """Nothing but a row of its own is changed: so the share's one writer may be another process."""
        for number in numbers if self._core.peer else ():
            self.propose(Lacks(number, node))

    # -- follower --------------------------------------------------------------------------------------------------

    def _take(self, token: int, payload: bytearray) -> None:
        said = _decode(payload)
        of, size = (said.epoch, said.session), len(memoryview(said.op))
        if not self._core.follows(*of):
            return  # of a leader that is none any more, or of a session that has ended
        if of != self._followed:
            self._followed = of
            self.keeper.end_session()
        op, link = decode_op(said.op), self._peering.link

        def finish(answer: Answer) -> None:
            if link is None or link.closing:
                return
            if token:
                link.send(Kind.FILE_ANSWER, token, encode(answer))
            else:
                (link.control or link).send(Kind.FILE_TAKEN, said.session, size.to_bytes(8, "big"))

        self.keeper.take(op, finish)
