"""What the DIMSE services have in common. One receiver object a message.

`feed` is called on the event loop with each piece of the data set; `respond` once it is complete, and writes the
responses.
"""

import asyncio
from dataclasses import dataclass
from typing import Protocol

from pydicom import Dataset

from gateway.dicom.dimse import Request, encode_response
from gateway.dicom.identifiers import BadQuery, decode_identifier
from gateway.dimse.context import Context
from gateway.dimse.peer import Peer


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

    async def _identifier(self) -> Dataset:
        """Raises BadQuery."""
        if self.too_long:
            raise BadQuery("too long")
        loop = asyncio.get_running_loop()
        data, syntax = bytes(self._collected), self._call.transfer_syntax
        return await loop.run_in_executor(self._context.executor, decode_identifier, data, syntax)


class Ignorer(Refuser):
    """The data set of a response; what we ask for says all in the command set."""

    def __init__(self) -> None:
        pass
