"""What the DIMSE services have in common. One receiver object a message.

`feed` is called on the event loop with each piece of the data set; `respond` once it is complete, and writes the
responses.
"""

import asyncio
import os
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydicom import Dataset

from conf.settings import DicomSettings
from gateway.dimse import Request, encode_response
from gateway.negotiate import Context, Negotiated
from gateway.query import BadQuery, decode_identifier
from storage.store import Store

if TYPE_CHECKING:
    from gateway.commitment import Commitments
    from gateway.tasks import Tasks


class Peer(Protocol):
    """The association as a service sees it."""

    calling_ae: str
    negotiated: Negotiated | None

    @property
    def may_send(self) -> bool: ...
    @property
    def quiet(self) -> bool: ...
    @property
    def contexts(self) -> dict[int, Context]: ...
    def send(self, context_id: int, command: bytes, data: bytes | None = None) -> None: ...
    async def drained(self) -> None: ...
    def cancelled(self, message_id: int) -> bool: ...
    async def invoke(
        self, context_id: int, elements: dict[int, int | str], data: AsyncIterator[memoryview], timeout_s: float
    ) -> Request: ...


class Services:
    """What the services work with."""

    tasks: "Tasks"
    commitments: "Commitments"

    def __init__(self, store: Store, settings: DicomSettings, executor: Executor) -> None:
        self.store, self.settings, self.executor = store, settings, executor
        self.converter = ThreadPoolExecutor(1, "convert")
        self.converting = asyncio.Semaphore(1)  # one object in memory for it


@dataclass(frozen=True)
class Call:
    """A request in its presentation context."""

    peer: Peer
    context_id: int
    abstract_syntax: str
    transfer_syntax: str
    request: Request

    def answer(self, status: int, comment: str = "") -> None:
        self.peer.send(self.context_id, encode_response(self.request, status, comment=comment))


class Receiver(Protocol):
    def feed(self, view: memoryview) -> None: ...
    @property
    def backlogged(self) -> bool: ...
    async def room(self) -> None: ...
    async def respond(self) -> None: ...
    async def abandon(self) -> None: ...


class Refuser:
    """Reads a request to its end and answers with a fixed status."""

    def __init__(self, call: Call, status: int, comment: str = "") -> None:
        self._call, self._status, self._comment = call, status, comment

    backlogged = False

    def feed(self, view: memoryview) -> None:
        pass

    async def room(self) -> None:
        pass

    async def respond(self) -> None:
        self._call.answer(self._status, self._comment)

    async def abandon(self) -> None:
        pass


class Collector(Refuser):
    """Collects a short data set: an identifier, the information of an action."""

    bytes_max = 1 << 20

    def __init__(self, call: Call, services: Services) -> None:
        super().__init__(call, 0)
        self._services = services
        self._collected = bytearray()

    def feed(self, view: memoryview) -> None:
        if not self.too_long:
            self._collected += view

    @property
    def too_long(self) -> bool:
        return len(self._collected) > self.bytes_max

    async def _identifier(self) -> Dataset:
        """Raises BadQuery."""
        if self.too_long:
            raise BadQuery("too long")
        loop = asyncio.get_running_loop()
        data, syntax = bytes(self._collected), self._call.transfer_syntax
        return await loop.run_in_executor(self._services.executor, decode_identifier, data, syntax)


class Ignorer(Refuser):
    """The data set of a response; what we ask for says all in the command set."""

    def __init__(self) -> None:
        pass


def place_of(error: BaseException) -> str:
    """Kind and place of an unforeseen error; its message, and values in it, may name a patient."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return type(error).__name__ + where
