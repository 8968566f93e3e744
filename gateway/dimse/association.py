"""One DICOM association over TCP: feeds the pure upper layer, runs the services in order, keeps the timeouts."""

import array
import asyncio
import fcntl
import socket
import termios
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final, Protocol, cast

import structlog

from conf.telling import place_of
from gateway.dicom.associate import AssociateRequest
from gateway.dicom.dimse import Command, CommandReceived, DataReceived
from gateway.dicom.states import State
from gateway.dicom.upper_layer import (
    Aborted,
    AssociationRequested,
    Event,
    Fragment,
    ProtocolError,
    ReleaseRequested,
)
from gateway.dimse import negotiate
from gateway.dimse.connection import AssociationEnded, Connection, is_response
from gateway.dimse.context import Context
from gateway.dimse.dispatch import receiver
from gateway.dimse.service import Call, Ignorer, Receiver
from storage.store import NotServing

log = structlog.get_logger()

QUEUED_MESSAGES_MAX: Final = 4
QUEUED_BEHIND_GET_MAX: Final = 64  # while answers of the other side are awaited, reading mustn't pause
CHECK_S: Final = 1.0


class Listener(Protocol):
    """Who listens: lets associations in and knows of all of them."""

    @property
    def draining(self) -> bool:
        """A switchover is near: nothing new is taken."""
        ...

    def admit(self, association: "Association") -> bool: ...
    def forget(self, association: "Association") -> None: ...
    async def answer(
        self, association: "Association", request: AssociateRequest
    ) -> negotiate.Negotiated | negotiate.Rejection: ...
    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None: ...
    def note_drained(self) -> None:
        """A request has ended while draining."""
        ...


class Association(Connection):
    def __init__(self, listener: Listener, context: Context) -> None:
        super().__init__(context.settings.max_pdu_bytes)
        self._listener, self._context = listener, context
        self._settings = context.settings
        self.contexts: dict[int, negotiate.Presentation] = {}
        self._receiving: Receiver | None = None
        self._queue: deque[Receiver | None] = deque()  # complete messages; None is the release request
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._answering: asyncio.Task[None] | None = None
        self._open: set[int] = set()  # message IDs that came and aren't answered
        self._cancels: set[int] = set()
        self._reading_paused = False
        self._timer: asyncio.TimerHandle | None = None
        self.since = self._loop.time()  # connect, last complete message, or start of the present one
        self._message_bytes = 0
        self._busy = False
        self._waiting: asyncio.Task[None] | None = None
        self._unread = (0, 0, 0.0)  # bytes that the other side hadn't taken, bytes it had, and since when
        self.negotiated: negotiate.Negotiated | None = None
        self.calling_ae = ""
        self.address = ""
        self.established = False

    @property
    def who(self) -> dict[str, str]:
        """The other side, for log lines."""
        return {"calling_ae": self.calling_ae, "address": self.address}

    # -- transport ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        if self.sock is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if not self._listener.admit(self):
            cast(asyncio.Transport, transport).abort()
            return
        self._timer = self._loop.call_later(CHECK_S, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer:
            self._timer.cancel()
        for task in (self._worker, self._answering):
            if task:
                task.cancel()
        for left in (self._receiving, *self._queue):
            if left is not None:
                self._listener.spawn(left.abandon())
        self._receiving = None
        self._queue.clear()
        self._listener.forget(self)

    def buffer_updated(self, nbytes: int) -> None:
        self._message_bytes += nbytes
        try:
            super().buffer_updated(nbytes)
        except Exception as error:  # the top of what comes from outside: this association ends, the others go on
            log.error("association.failed", error=place_of(error), **self.who)
            self._abort(2, 0, "internal error")
        self._pace()

    # -- events ------------------------------------------------------------------------------------------------

    def _on(self, event: Event) -> None:
        match event:
            case Fragment():
                self._on_fragment(event)
            case AssociationRequested():
                self.calling_ae = event.request.calling_aet
                self._answering = self._loop.create_task(self._answer(event.request))
            case ReleaseRequested():
                self._queue.append(None)
                self._arrived.set()
            case Aborted():
                log.info("association.aborted", source=event.source, reason=event.reason, **self.who)
                self._close()

    async def _answer(self, request: AssociateRequest) -> None:
        answer = await self._listener.answer(self, request)
        if self._upper.state is not State.STA3:
            return  # aborted meanwhile
        if isinstance(answer, negotiate.Rejection):
            log.info("association.rejected", why=answer.why, **self.who)
            self._write(self._upper.reject(answer.result, answer.source, answer.reason))
            self._close()
            self._loop.call_later(CHECK_S, self._cut)
            return
        self.negotiated = answer
        self.contexts = answer.contexts
        self.established = True
        self.since = self._loop.time()
        self._write(self._upper.accept(answer.response, answer.peer_max_pdu_bytes))
        self._worker = self._loop.create_task(self._work())
        log.debug(
            "association.accepted",
            implementation=answer.implementation,
            user=answer.user,
            contexts=len(self.contexts),
            **self.who,
        )

    def _on_fragment(self, fragment: Fragment) -> None:
        if not self._assembler.mid_message:
            self.since, self._message_bytes = self._loop.time(), 0
        if fragment.context_id not in self.contexts:
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
            if request.responded_to in self._open:  # one that comes late is for nothing
                self._cancels.add(request.responded_to)
            return
        if is_response(request):
            self._answered(request)
            self._receiving = Ignorer() if request.has_data else None
            return
        context = self.contexts[event.context_id]
        self._cancels.discard(request.message_id)
        self._open.add(request.message_id)
        call = Call(self, event.context_id, context.abstract_syntax, context.transfer_syntax, request)
        self._receiving = receiver(call, self._context)
        if not request.has_data:
            self._message_complete()

    def _message_complete(self) -> None:
        if isinstance(self._receiving, Ignorer):
            self._receiving = None
            return
        self._queue.append(self._receiving)
        self._receiving = None
        self.since = self._loop.time()
        self._arrived.set()

    # -- pace --------------------------------------------------------------------------------------------------

    @property
    def _queue_full(self) -> bool:
        return len(self._queue) >= (QUEUED_BEHIND_GET_MAX if self._outstanding else QUEUED_MESSAGES_MAX)

    def _pace(self) -> None:
        """Stop reading while disks, the peer or the services are behind: memory is bounded whatever is sent."""
        if self._reading_paused or self._transport is None or self._transport.is_closing():
            return
        backlogged = self._receiving is not None and self._receiving.backlogged
        if self._outstanding and self._queue_full:
            self._abort(0, 0, "too many requests behind a C-GET")
        elif backlogged or self._queue_full:
            self._reading_paused = True
            self._transport.pause_reading()
            self._waiting = self._loop.create_task(self._resume_when_possible())

    async def _resume_when_possible(self) -> None:
        while self._receiving is not None and self._receiving.backlogged:
            await self._receiving.room()
        while self._queue_full:
            self._taken.clear()
            await self._taken.wait()
        self._reading_paused = False
        self.since = self._loop.time()  # what the other side couldn't send isn't held against it
        if self._transport and not self._transport.is_closing():
            self._transport.resume_reading()

    def _answer_awaited(self) -> None:
        """An answer of the other side has to come through, whatever else it has sent."""
        self._taken.set()

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
            answered = False
            self._busy, started = True, self._loop.time()
            try:
                await message.respond()
                answered = True
            except NotServing as error:
                self._abort(0, 0, str(error))
                return
            except AssociationEnded:
                return
            except Exception as error:  # top of the loop: this association ends, the others go on
                log.error("service.failed", error=place_of(error), **self.who)
                self._abort(0, 0, "internal error")
                return
            finally:
                self._busy = False
                self.since = self._loop.time()
                if not answered:
                    self._listener.spawn(message.abandon())
                self._done(message, self.since - started)

    def _done(self, message: Receiver, seconds: float) -> None:
        call = message.call
        self._open.discard(call.request.message_id)
        self._cancels.discard(call.request.message_id)
        self._context.meter.done(call, seconds)
        if self._listener.draining:
            self.drain()
            self._listener.note_drained()

    @property
    def quiet(self) -> bool:
        """Established, and nothing is under way: a notification may be sent."""
        return self.may_send and not (self._busy or self._queue or self._outstanding or self._assembler.mid_message)

    @property
    def busy(self) -> bool:
        """A request is being received or answered."""
        return self.established and (self._busy or bool(self._queue) or self._assembler.mid_message)

    def drain(self) -> None:
        """A switchover is near: end the association, at once or after the request that is under way."""
        if self.established and not self.busy:
            self.abort("switching over")

    def cancelled(self, message_id: int) -> bool:
        return message_id in self._cancels

    def abort(self, why: str) -> None:
        """End the association at once, as the service user."""
        self._abort(0, 0, why)

    def _abort(self, source: int, reason: int, why: str) -> None:
        log.warning("association.abort", why=why, state=self._upper.state.name, **self.who)
        super()._abort(source, reason, why)

    # -- time --------------------------------------------------------------------------------------------------

    def _cut_off(self) -> None:
        log.warning("association.cut", why="it doesn't read what it asked for", **self.who)
        self._cut()

    def _check(self) -> None:
        if self._transport is None:
            return
        self._timer = self._loop.call_later(CHECK_S, self._check)
        if self._reads_nothing():
            self._cut_off()
            return
        why = self._overdue(self._loop.time() - self.since)
        if why:
            self.since = self._loop.time()
            self._abort(2, 0, why)

    def _reads_nothing(self) -> bool:
        """The other side has taken nothing of what it was sent for as long as a message may take."""
        if self._transport is None:
            return False
        left = self._transport.get_write_buffer_size() + self._in_kernel()
        now = self._loop.time()
        before, taken, since = self._unread
        if not left or left < before or self.bytes_sent - left != taken:
            self._unread = (left, self.bytes_sent - left, now)
            return False
        return now - since > self._settings.message_timeout_s

    def _in_kernel(self) -> int:
        """Bytes that wait in the socket, or weren't acknowledged (tcp(7), SIOCOUTQ)."""
        if self.sock is None:
            return 0
        count = array.array("i", [0])
        try:
            fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, count)
        except (OSError, ValueError):
            return 0
        return count[0]

    def _overdue(self, seconds: float) -> str:
        settings = self._settings
        if self._upper.state is State.STA13:
            return ""  # `_cut` comes by itself
        if not self.established:
            return "ARTIM timer: no association request" if seconds > settings.artim_timeout_s else ""
        if self._busy or self._reading_paused:
            return ""  # what is slow here has time limits of its own
        if self._assembler.mid_message or self._upper.mid_pdu:
            allowed = settings.message_timeout_s + self._message_bytes / settings.minimum_rate_bytes_s
            return "the message comes too slowly" if seconds > allowed else ""
        return "idle for too long" if seconds > settings.idle_timeout_s else ""
