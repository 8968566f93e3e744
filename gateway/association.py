"""One DICOM association over TCP: feeds the pure upper layer, runs the services in order, keeps the timeouts."""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final, cast

import structlog

from gateway import negotiate
from gateway.dimse import Assembler, Command, CommandReceived, DataReceived
from gateway.services import Call, Receiver, receiver
from gateway.states import State
from gateway.upper_layer import (
    Aborted,
    AssociationRequested,
    Event,
    Fragment,
    ProtocolError,
    ReleaseRequested,
    UpperLayer,
)
from storage.ingest import NotServing

if TYPE_CHECKING:
    from gateway.server import DicomServer

log = structlog.get_logger()

RECEIVE_BYTES: Final = 256 << 10
QUEUED_MESSAGES_MAX: Final = 4
CANCELS_KEPT_MAX: Final = 64
CHECK_S: Final = 1.0
CLOSE_S: Final = 5.0


class Association(asyncio.BufferedProtocol):
    def __init__(self, server: "DicomServer") -> None:
        self._server = server
        self._settings = server.settings
        self._loop = asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._upper = UpperLayer(self._settings.max_pdu_bytes)
        self._assembler = Assembler()
        self._transport: asyncio.Transport | None = None
        self._contexts: dict[int, tuple[str, str]] = {}
        self._receiving: Receiver | None = None
        self._queue: deque[Receiver | None] = deque()  # complete messages; None is the release request
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._cancels: set[int] = set()
        self._writable = asyncio.Event()
        self._writable.set()
        self._reading_paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._since = self._loop.time()  # connect, last complete message, or start of the present one
        self._message_bytes = 0
        self._busy = False
        self._waiting: asyncio.Task[None] | None = None
        self.calling_ae = ""
        self.established = False

    # -- transport ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast(asyncio.Transport, transport)  # uvloop's is one without saying so
        self._transport = stream
        if not self._server.admit(self):
            stream.abort()
            return
        self._timer = self._loop.call_later(CHECK_S, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._writable.set()
        if self._timer:
            self._timer.cancel()
        if self._worker:
            self._worker.cancel()
        for left in (self._receiving, *self._queue):
            if left is not None:
                self._server.spawn(left.abandon())
        self._receiving = None
        self._queue.clear()
        self._server.forget(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._message_bytes += nbytes
        try:
            for event in self._upper.receive(self._buffer[:nbytes]):
                self._on(event)
                if self._upper.state is State.STA13:
                    break
        except ProtocolError as error:
            self._abort(2, error.reason, str(error))
        self._pace()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _write(self, data: bytes) -> None:
        if self._transport and not self._transport.is_closing():
            self._transport.write(data)

    def _close(self) -> None:
        if self._transport:
            self._transport.close()

    # -- events ------------------------------------------------------------------------------------------------

    def _on(self, event: Event) -> None:
        match event:
            case Fragment():
                self._on_fragment(event)
            case AssociationRequested():
                self._on_request(event)
            case ReleaseRequested():
                self._queue.append(None)
                self._arrived.set()
            case Aborted():
                log.info("association.aborted", calling_ae=self.calling_ae, source=event.source, reason=event.reason)
                self._close()

    def _on_request(self, event: AssociationRequested) -> None:
        try:
            answer = self._server.negotiate(event.request)
        except Exception as error:  # the codec's primitives raise whatever odd items lead them to
            self._abort(2, 6, f"association request: {type(error).__name__}: {error}")
            return
        if isinstance(answer, negotiate.Rejection):
            log.info("association.rejected", why=answer.why)
            self._write(self._upper.reject(answer.result, answer.source, answer.reason))
            self._close()
            return
        self.calling_ae, self._contexts = answer.calling_ae, answer.contexts
        self.established = True
        self._since = self._loop.time()
        self._write(self._upper.accept(answer.response, answer.peer_max_pdu_bytes))
        self._worker = self._loop.create_task(self._work())
        log.debug("association.accepted", calling_ae=self.calling_ae, contexts=len(self._contexts))

    def _on_fragment(self, fragment: Fragment) -> None:
        if not self._assembler.mid_message:
            self._since, self._message_bytes = self._loop.time(), 0
        if fragment.context_id not in self._contexts:
            raise ProtocolError(f"presentation context {fragment.context_id} wasn't accepted", 6)
        event = self._assembler.receive(fragment)
        if isinstance(event, DataReceived):
            if self._receiving is None:
                raise ProtocolError("a data set that nobody waits for")
            if event.data:
                self._receiving.feed(event.data)
            if event.last:
                self._message_complete()
        elif isinstance(event, CommandReceived):
            self._on_command(event)

    def _on_command(self, event: CommandReceived) -> None:
        request = event.request
        if request.field == Command.C_CANCEL_RQ:
            if len(self._cancels) < CANCELS_KEPT_MAX:
                self._cancels.add(request.responded_to)
            return
        if request.field & Command.RESPONSE:
            raise ProtocolError("a response that nobody asked for")
        abstract, transfer = self._contexts[event.context_id]
        self._cancels.discard(request.message_id)
        self._receiving = receiver(Call(self, event.context_id, abstract, transfer, request), self._server.services)
        if not request.has_data:
            self._message_complete()

    def _message_complete(self) -> None:
        self._queue.append(self._receiving)
        self._receiving = None
        self._since = self._loop.time()
        self._arrived.set()

    def _pace(self) -> None:
        """Stop reading while disks, the peer or the services are behind: memory is bounded whatever is sent."""
        if self._reading_paused or self._transport is None or self._transport.is_closing():
            return
        backlogged = self._receiving is not None and self._receiving.backlogged
        if backlogged or len(self._queue) >= QUEUED_MESSAGES_MAX:
            self._reading_paused = True
            self._transport.pause_reading()
            self._waiting = self._loop.create_task(self._resume_when_possible())

    async def _resume_when_possible(self) -> None:
        while self._receiving is not None and self._receiving.backlogged:
            await self._receiving.room()
        while len(self._queue) >= QUEUED_MESSAGES_MAX:
            self._taken.clear()
            await self._taken.wait()
        self._reading_paused = False
        if self._transport and not self._transport.is_closing():
            self._transport.resume_reading()

    # -- services ----------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            message = self._queue.popleft()
            self._taken.set()
            if message is None:
                if self._upper.state is State.STA8:
                    self._write(self._upper.release_response())
                    self._close()
                return
            self._busy = True
            try:
                await message.respond()
            except NotServing as error:
                self._abort(0, 0, str(error))
                return
            except asyncio.CancelledError:
                self._server.spawn(message.abandon())
                raise
            except Exception as error:  # top of the loop: this association ends, the others go on
                log.exception("service.failed", error=f"{type(error).__name__}: {error}")
                self._abort(0, 0, "internal error")
                return
            finally:
                self._busy = False
                self._since = self._loop.time()

    def send(self, context_id: int, command: bytes, data: bytes | None = None) -> None:
        if self._upper.state not in (State.STA6, State.STA8):
            return
        out = self._upper.data(context_id, True, command)
        if data is not None:
            out += self._upper.data(context_id, False, data)
        self._write(out)

    async def drained(self) -> None:
        await self._writable.wait()

    def cancelled(self, message_id: int) -> bool:
        return message_id in self._cancels

    def abort(self, why: str) -> None:
        """End the association at once, as the service user."""
        self._abort(0, 0, why)

    def _abort(self, source: int, reason: int, why: str) -> None:
        log.warning("association.abort", why=why, calling_ae=self.calling_ae, state=self._upper.state.name)
        self._write(self._upper.abort(source, reason))
        self._close()

    # -- time --------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._transport is None:
            return
        self._timer = self._loop.call_later(CHECK_S, self._check)
        why = self._overdue(self._loop.time() - self._since)
        if why == "close":
            self._transport.abort()
        elif why:
            self._since = self._loop.time()
            self._abort(2, 0, why)

    def _overdue(self, seconds: float) -> str:
        settings = self._settings
        if self._upper.state is State.STA13:
            return "close" if seconds > CLOSE_S else ""
        if not self.established:
            return "ARTIM timer: no association request" if seconds > settings.artim_timeout_s else ""
        if self._busy or self._reading_paused:
            return ""
        if self._assembler.mid_message or self._upper.mid_pdu:
            allowed = settings.message_timeout_s + self._message_bytes / settings.minimum_rate_bytes_s
            return "the message comes too slowly" if seconds > allowed else ""
        return "idle for too long" if seconds > settings.idle_timeout_s else ""
