"""One association's transport and messages, whichever side asked for it: bytes to events, requests out, answers in.

What the two sides do differently, answering requests (`Association`) and asking (`Requestor`), is in subclasses.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Final, cast

from gateway.dicom.dimse import Assembler, Command, Request, encode_command
from gateway.dicom.states import State
from gateway.dicom.upper_layer import Event, ProtocolError, UpperLayer

RECEIVE_BYTES: Final = 256 << 10
FIRST_BYTES: Final = 4 << 10  # until there is an association: a connection alone costs next to nothing
MESSAGE_ID_MAX: Final = 0xFFFF
CLOSE_S: Final = 5.0
SHORT_BYTES: Final = 4 << 10  # more than two segments are acknowledged at once anyway


class AssociationEnded(Exception):
    """It was released, aborted or lost before the answer came."""


class Connection(asyncio.BufferedProtocol):
    def __init__(self, max_pdu_bytes: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(FIRST_BYTES))
        self.bytes_sent = 0
        self._upper = UpperLayer(max_pdu_bytes)
        self._assembler = Assembler()
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._sending = asyncio.Lock()  # a data set of ours is on its way
        self._outstanding: dict[int, asyncio.Future[Request]] = {}
        self._message_id = 0
        self._given_up: set[int] = set()  # whose answers came too late, or will
        self._held: list[bytes] = []  # messages that wait for the data set that is on its way, or for the next one

    # -- transport ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so
        self.sock = transport.get_extra_info("socket")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._writable.set()
        self._fail_outstanding(str(exc or "the connection was closed"))
        self._outstanding.clear()

    def _fail_outstanding(self, why: str) -> None:
        """No answer will come any more."""
        for waiting in self._outstanding.values():
            if not waiting.done():
                waiting.set_exception(AssociationEnded(why))
                waiting.exception()  # seen here; whoever still waits sees it too

    def get_buffer(self, sizehint: int) -> memoryview:
        if len(self._buffer) < RECEIVE_BYTES and self._upper.state is State.STA6:
            self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if nbytes < SHORT_BYTES:
            self._acknowledge()
        try:
            for event in self._upper.receive(self._buffer[:nbytes]):
                self._on(event)
                if self._upper.state is State.STA13:
                    break
        except ProtocolError as error:
            self._abort(2, error.reason, str(error))

    def _acknowledge(self) -> None:
        """At once, instead of up to 40 ms later: toolkits that leave Nagle's algorithm on (DCMTK's, Orthanc's) send the
        head of a PDU and wait for this before they send the rest."""
        if self.sock is not None:
            with contextlib.suppress(OSError):  # it is gone; that is told in another way
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _write(self, data: bytes) -> None:
        if self._transport and not self._transport.is_closing():
            self.bytes_sent += len(data)
            self._transport.write(data)

    def _write_parts(self, parts: Sequence[bytes | memoryview]) -> None:
        if self._transport and not self._transport.is_closing():
            self.bytes_sent += sum(map(len, parts))
            self._transport.writelines(parts)

    def _close(self) -> None:
        if self._transport:
            self._transport.close()

    def _on(self, event: Event) -> None:
        raise NotImplementedError

    def _abort(self, source: int, reason: int, why: str) -> None:
        self._write(self._upper.abort(source, reason))
        self._close()
        self._loop.call_later(CLOSE_S, self._cut)

    def _cut(self) -> None:
        """The other side doesn't even read the end of what was sent."""
        if self._transport:
            self._transport.abort()

    # -- messages ----------------------------------------------------------------------------------------------

    @property
    def may_send(self) -> bool:
        return self._transport is not None and self._upper.state in (State.STA6, State.STA8)

    def send(self, context_id: int, command: bytes, data: bytes | None = None) -> None:
        """A whole message, at once."""
        if not self.may_send:
            return
        self._held.append(self._upper.data(context_id, True, command))
        if data is not None:
            self._held.append(self._upper.data(context_id, False, data))
        if not self._sending.locked():
            self._write_held()

    def send_soon(self, context_id: int, command: bytes) -> None:
        """With the next message, of whatever kind: one write less."""
        if self.may_send:
            self._held.append(self._upper.data(context_id, True, command))

    def _write_held(self) -> None:
        held, self._held = self._held, []
        self._write_parts(held)

    def _cut_off(self) -> None:
        """It doesn't read what it is sent."""
        self._cut()

    async def drained(self, timeout_s: float) -> None:
        """Wait until the other side has taken most of what it was sent. One that doesn't read is cut off. Raises
        AssociationEnded."""
        try:
            await asyncio.wait_for(self._writable.wait(), timeout_s)
        except TimeoutError:
            self._cut_off()
            raise AssociationEnded("the other side reads nothing") from None
        if not self.may_send:
            raise AssociationEnded("the association has ended")

    async def invoke(
        self, context_id: int, elements: dict[int, int | str], data: AsyncIterator[memoryview], timeout_s: float
    ) -> Request:
        """Send a request with a data set, piece by piece, and wait for its response (as `Request`, with `status`).

        `timeout_s` is for each piece to be taken, and for the answer. Raises AssociationEnded, TimeoutError, or what
        `data` raises; when a data set breaks off the association is aborted."""
        message_id = 0
        try:
            async with self._sending:
                if not self.may_send:
                    raise AssociationEnded("the association has ended")
                message_id, answer = self._expect_answer()
                await self._send_request(context_id, {**elements, 0x0110: message_id}, data, timeout_s)
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            self._given_up.add(message_id)
            raise
        finally:
            self._outstanding.pop(message_id, None)

    async def _send_request(
        self, context_id: int, elements: dict[int, int | str], data: AsyncIterator[memoryview], timeout_s: float
    ) -> None:
        begun = whole = False
        try:
            # The command goes with the first of its data, and nothing of it if those can't be had.
            held, self._held = self._held, []
            ahead = [*held, *self._upper.parts(context_id, True, encode_command(elements))]
            before: memoryview | None = None
            async for piece in data:
                if before is not None:
                    ahead += self._upper.parts(context_id, False, before, last=False)
                    begun = True
                    await self._send_parts(ahead, timeout_s)
                    ahead = []
                before = piece
            ahead += self._upper.parts(context_id, False, before or memoryview(b""))
            begun = True
            await self._send_parts(ahead, timeout_s)
            whole = True
        finally:
            if (whole or not begun) and self.may_send:
                self._held = [*(() if begun else held), *self._held]
                self._write_held()
            elif self.may_send:
                self._abort(0, 0, "a data set broke off")

    def _expect_answer(self) -> "tuple[int, asyncio.Future[Request]]":
        while True:
            self._message_id = self._message_id % MESSAGE_ID_MAX + 1
            if self._message_id not in self._outstanding:
                break
        self._given_up.discard(self._message_id)
        answer = self._outstanding[self._message_id] = self._loop.create_future()
        self._answer_awaited()
        return self._message_id, answer

    def _answer_awaited(self) -> None:
        """A request of ours is about to go out."""

    async def _send_parts(self, parts: Sequence[bytes | memoryview], timeout_s: float) -> None:
        if not self.may_send:
            raise AssociationEnded("the association has ended")
        self._write_parts(parts)
        if not self._writable.is_set():
            await asyncio.wait_for(self._writable.wait(), timeout_s)

    def _answered(self, response: Request) -> None:
        if response.responded_to in self._given_up:
            self._given_up.discard(response.responded_to)
            return
        waiting = self._outstanding.get(response.responded_to)
        if waiting is None or waiting.done():
            raise ProtocolError("a response that nobody asked for")
        waiting.set_result(response)


def is_response(request: Request) -> bool:
    return bool(request.field & Command.RESPONSE)
