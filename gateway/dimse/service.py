"""What the DIMSE services have in common. One receiver object a message.

`feed` is called on the event loop with each piece of the data set; `respond` once it is complete, and writes the
responses.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from gateway.dicom.dimse import Request, encode_response
from gateway.dicom.identifiers import BadQuery, decode_identifier
from gateway.dimse.context import Context
from gateway.dimse.peer import Peer

T = TypeVar("T")


@dataclass
class Outcome:
    """How a request ended, for log and metrics. `status` is None until it is answered."""

    status: int | None = None
    comment: str = ""
    bytes: int = 0
    count: int = 0  # answers, or sub-operations


@dataclass(frozen=True)
class Call:
    """A request in its presentation context."""

    peer: Peer
    context_id: int
    abstract_syntax: str
    transfer_syntax: str
    request: Request
    outcome: Outcome = field(default_factory=Outcome)

    def answer(self, status: int, comment: str = "") -> None:
        """The final response."""
        self.respond(status, encode_response(self.request, status, comment=comment), comment=comment)

    def respond(self, status: int, response: bytes, data: bytes | None = None, comment: str = "") -> None:
        """The final response, encoded."""
        self.outcome.status, self.outcome.comment = status, comment
        self.peer.send(self.context_id, response, data)


class Receiver(Protocol):
    @property
    def call(self) -> Call: ...
    def feed(self, view: memoryview) -> None: ...
    @property
    def backlogged(self) -> bool: ...
    async def room(self) -> None: ...
    async def respond(self) -> None: ...
    async def abandon(self) -> None: ...


class Refuser:
    """Reads a request to its end and answers with a fixed status."""

    def __init__(self, call: Call, status: int, comment: str = "") -> None:
        self.call, self._status, self._comment = call, status, comment

    backlogged = False

    def feed(self, view: memoryview) -> None:
        pass

    async def room(self) -> None:
        pass

    async def respond(self) -> None:
        self.call.answer(self._status, self._comment)

    async def abandon(self) -> None:
        pass


class Collector(Refuser):
    """Collects a short data set: an identifier, the information of an action."""

    bytes_max = 1 << 20

    def __init__(self, call: Call, context: Context) -> None:
        super().__init__(call, 0)
        self._context = context
        self._collected = bytearray()

    def feed(self, view: memoryview) -> None:
        if not self.too_long:
            self._collected += view

    @property
    def too_long(self) -> bool:
        return len(self._collected) > self.bytes_max

    async def _read(self, make: Callable[..., T], *arguments: Any) -> T:
        """`make(identifier, *arguments)`, in a thread. Raises BadQuery."""
        if self.too_long:
            raise BadQuery("too long")
        loop = asyncio.get_running_loop()
        data, syntax = bytes(self._collected), self.call.transfer_syntax

        def read() -> T:
            return make(decode_identifier(data, syntax), *arguments)

        return await loop.run_in_executor(self._context.executor, read)


class Ignorer(Refuser):
    """The data set of a response; what we ask for says all in the command set."""

    def __init__(self) -> None:
        pass
