"""Associations that this node asks for: to send instances (C-MOVE) and to report commitments.

The bytes of data sets go out as they are stored.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Final

import structlog

from conf.telling import reason_of
from gateway.archive.destinations import Destination
from gateway.dicom.associate import ACCEPTANCE, CONTEXTS_MAX, AssociateRequest, Proposed, about_us, encode_request
from gateway.dicom.dimse import CommandReceived, encode_response
from gateway.dicom.states import State
from gateway.dicom.upper_layer import (
    Aborted,
    AssociationAccepted,
    AssociationRejected,
    Collided,
    Event,
    Released,
    ReleaseRequested,
)
from gateway.dimse.connection import AssociationEnded, Connection, is_response

log = structlog.get_logger()

WINDOW: Final = 8  # operations that we would have under way at once
MAX_PDU_BYTES: Final = 131072


class Unreachable(Exception):
    """No association: no route, refused, rejected, or silent."""


class Requestor(Connection):
    def __init__(self) -> None:
        super().__init__(MAX_PDU_BYTES)
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ended = asyncio.Event()
        self.contexts: dict[int, tuple[str, str]] = {}  # accepted: ID -> (abstract syntax, transfer syntax)
        self.window = 1  # operations that the other side lets us have under way

    @classmethod
    async def associate(
        cls,
        own_aet: str,
        to: Destination,
        contexts: Sequence[tuple[str, Sequence[str]]],
        *,
        as_scp: bool = False,
        source: str = "",
    ) -> "Requestor":
        """Ask for an association with these presentation contexts (abstract syntax, transfer syntaxes), at most 128.
        `as_scp`: we play the SCP's part; `source`: the address to come from. Raises Unreachable."""
        local = (source, 0) if source else None
        loop = asyncio.get_running_loop()
        connection = None
        host, port = to.settings.host, to.settings.port
        try:
            async with asyncio.timeout(to.timeout_s):
                _, connection = await loop.create_connection(cls, host, port, ssl=await to.tls(), local_addr=local)
                connection._ask(own_aet, to.aet, contexts, as_scp=as_scp)
                await connection._ready
        except asyncio.CancelledError:
            if connection:
                connection.abort()
            raise
        except (OSError, TimeoutError) as error:
            if connection:
                connection.abort()
            raise Unreachable(f"{to.aet} at {host}:{port}: {reason_of(error)}") from error
        except AssociationEnded as error:
            raise Unreachable(f"{to.aet}: {error}") from error
        return connection

    def _ask(self, own: str, called: str, contexts: Sequence[tuple[str, Sequence[str]]], *, as_scp: bool) -> None:
        proposed = tuple(
            Proposed(2 * number + 1, abstract, tuple(transfer))
            for number, (abstract, transfer) in enumerate(contexts[:CONTEXTS_MAX])
        )
        self._proposed = {context.context_id: context.abstract_syntax for context in proposed}
        user = about_us(MAX_PDU_BYTES)
        if as_scp:
            user = replace(user, roles={abstract: (False, True) for abstract, _ in contexts})
        else:
            user = replace(user, window=(WINDOW, 1))
        self._write(self._upper.request(encode_request(AssociateRequest(called, own, proposed, user))))

    def context_for(self, abstract: str) -> int | None:
        """An accepted context of a SOP class."""
        return next((number for number, accepted in self.contexts.items() if accepted[0] == abstract), None)

    # -- events ------------------------------------------------------------------------------------------------

    def _on(self, event: Event) -> None:
        match event:
            case AssociationAccepted():
                self._accepted(event)
            case AssociationRejected():
                why = f"rejected (result {event.result}, source {event.source}, reason {event.reason})"
                self._end(why)
            case Aborted():
                self._end(f"aborted (source {event.source}, reason {event.reason})")
            case ReleaseRequested():
                self._write(self._upper.release_response())
                self._end("released by the other side")
            case Collided():
                self._write(event.response)
            case Released():
                self._end("released")
            case _:
                received = self._assembler.receive(event)  # type: ignore[arg-type]
                if isinstance(received, CommandReceived):  # the answers we wait for say all in the command set
                    self._on_command(received)

    def _accepted(self, event: AssociationAccepted) -> None:
        for result in event.response.results:
            if result.result == ACCEPTANCE and result.context_id in self._proposed:
                self.contexts[result.context_id] = (self._proposed[result.context_id], result.transfer_syntax)
        if event.response.user.window:
            self.window = min(WINDOW, event.response.user.window[0] or WINDOW)
        if not self._ready.done():
            self._ready.set_result(None)

    def _on_command(self, event: CommandReceived) -> None:
        if is_response(event.request):
            self._answered(event.request)
        else:
            self.send(event.context_id, encode_response(event.request, 0x0211))

    def _end(self, why: str) -> None:
        if not self._ready.done():
            self._ready.set_exception(AssociationEnded(why))
        self._fail_outstanding(why)
        self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if not self._ready.done():
            self._ready.set_exception(AssociationEnded(str(exc or "the connection was closed")))
            self._ready.exception()
        self._ended.set()

    def _abort(self, source: int, reason: int, why: str) -> None:
        super()._abort(source, reason, why)
        self._end(why)

    # -- end ---------------------------------------------------------------------------------------------------

    async def release(self, timeout_s: float = 5.0) -> None:
        """End the association in the Standard's way, or else cut it."""
        if self._transport is None:
            return
        if self._upper.state is State.STA6:
            self._write(self._upper.release_request())
            try:
                await asyncio.wait_for(self._ended.wait(), timeout_s)
            except TimeoutError:
                self.abort()
        else:
            self.abort()

    def abort(self) -> None:
        if self._transport is not None and self._upper.state is not State.STA13:
            self._abort(0, 0, "aborted")
        self._close()


async def whole(data: bytes) -> AsyncIterator[memoryview]:
    """A data set in one piece."""
    yield memoryview(data)


def event_report(sop_class: str, sop_instance: str, event_type: int) -> dict[int, int | str]:
    """N-EVENT-REPORT-RQ (PS3.7 10.3.1)."""
    return {0x0002: sop_class, 0x0100: 0x0100, 0x0800: 1, 0x1000: sop_instance, 0x1002: event_type}


def store_request(
    sop_class: str, sop_instance: str, priority: int, originator: tuple[str, int] | None
) -> dict[int, int | str]:
    """C-STORE-RQ (PS3.7 9.3.1); `originator` is (AE title, message ID) of the C-MOVE it is part of."""
    elements: dict[int, int | str] = {
        0x0002: sop_class,
        0x0100: 0x0001,
        0x0700: priority,
        0x0800: 1,
        0x1000: sop_instance,
    }
    if originator:
        elements[0x1030], elements[0x1031] = originator
    return elements
