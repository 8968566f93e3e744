"""One DICOM association over TCP: feeds the pure upper layer, runs the services in order, keeps the timeouts."""

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final, Protocol, cast

import structlog
from pynetdicom.pdu import A_ASSOCIATE_RQ

from conf.telling import place_of
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
from gateway.dimse.connection import Connection, is_response
from gateway.dimse.context import Context
from gateway.dimse.dispatch import receiver
from gateway.dimse.service import Call, Ignorer, Receiver
from storage.store import NotServing

log = structlog.get_logger()

QUEUED_MESSAGES_MAX: Final = 4
CANCELS_KEPT_MAX: Final = 64
CHECK_S: Final = 1.0
CLOSE_S: Final = 5.0


class Listener(Protocol):
    """Who listens: lets associations in and knows of all of them."""

    @property
    def draining(self) -> bool:
        """A switchover is near: nothing new is taken."""
        ...

    def admit(self, association: "Association") -> bool: ...
    def forget(self, association: "Association") -> None: ...
    def negotiate(self, request: A_ASSOCIATE_RQ) -> negotiate.Negotiated | negotiate.Rejection: ...
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
        self._cancels: set[int] = set()
        self._reading_paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._since = self._loop.time()  # connect, last complete message, or start of the present one
        self._message_bytes = 0
        self._busy = False
        self._waiting: asyncio.Task[None] | None = None
        self.negotiated: negotiate.Negotiated | None = None
        self.calling_ae = ""
        self.established = False

    # -- transport ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self._listener.admit(self):
            cast(asyncio.Transport, transport).abort()
            return
        self._timer = self._loop.call_later(CHECK_S, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer:
            self._timer.cancel()
        if self._worker:
            self._worker.cancel()
        for left in (self._receiving, *self._queue):
            if left is not None:
                self._listener.spawn(left.abandon())
        self._receiving = None
        self._queue.clear()
        self._listener.forget(self)

    def buffer_updated(self, nbytes: int) -> None:
        self._message_bytes += nbytes
        super().buffer_updated(nbytes)
        self._pace()

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
            answer = self._listener.negotiate(event.request)
        except Exception as error:  # the codec's primitives raise whatever odd items lead them to
            self._abort(2, 6, f"association request: {type(error).__name__}: {error}")
            return
        if isinstance(answer, negotiate.Rejection):
            log.info("association.rejected", why=answer.why)
            self._write(self._upper.reject(answer.result, answer.source, answer.reason))
            self._close()
            return
        self.negotiated = answer
        self.calling_ae, self.contexts = answer.calling_ae, answer.contexts
        self.established = True
        self._since = self._loop.time()
        self._write(self._upper.accept(answer.response, answer.peer_max_pdu_bytes))
        self._worker = self._loop.create_task(self._work())
        log.debug(
            "association.accepted",
            calling_ae=self.calling_ae,
            implementation=answer.implementation,
            user=answer.user,
            contexts=len(self.contexts),
        )

    def _on_fragment(self, fragment: Fragment) -> None:
        if not self._assembler.mid_message:
            self._since, self._message_bytes = self._loop.time(), 0
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
            if len(self._cancels) < CANCELS_KEPT_MAX:
                self._cancels.add(request.responded_to)
            return
        if is_response(request):
            self._answered(request)
            self._receiving = Ignorer() if request.has_data else None
            return
        context = self.contexts[event.context_id]
        self._cancels.discard(request.message_id)
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
        self._since = self._loop.time()
        self._arrived.set()

    def _pace(self) -> None:
        """Stop reading while disks, the peer or the services are behind: memory is bounded whatever is sent."""
        if self._reading_paused or self._transport is None or self._transport.is_closing():
            return
        backlogged = self._receiving is not None and self._receiving.backlogged
        most = QUEUED_MESSAGES_MAX if not self._outstanding else CANCELS_KEPT_MAX  # an answer is to come through
        if backlogged or len(self._queue) >= most:
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
                self._listener.spawn(message.abandon())
                raise
            except Exception as error:  # top of the loop: this association ends, the others go on
                log.error("service.failed", error=place_of(error))
                self._abort(0, 0, "internal error")
                return
            finally:
                self._busy = False
                self._since = self._loop.time()
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
        log.warning("association.abort", why=why, calling_ae=self.calling_ae, state=self._upper.state.name)
        super()._abort(source, reason, why)

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
