"""The association as a service sees it."""

from collections.abc import AsyncIterator
from typing import Protocol

from gateway.dicom.dimse import Request
from gateway.dimse.negotiate import Negotiated, Presentation


class Peer(Protocol):
    """The association as a service sees it."""

    calling_ae: str
    negotiated: Negotiated | None

    @property
    def may_send(self) -> bool: ...
    @property
    def quiet(self) -> bool: ...
    @property
    def contexts(self) -> dict[int, Presentation]: ...
    def send(self, context_id: int, command: bytes, data: bytes | None = None) -> None: ...
    def send_soon(self, context_id: int, command: bytes) -> None: ...
    async def drained(self, timeout_s: float) -> None:
        """Raises AssociationEnded."""
        ...

    @property
    def who(self) -> dict[str, str]:
        """The other side, for log lines."""
        ...

    def cancelled(self, message_id: int) -> bool: ...
    async def invoke(
        self, context_id: int, elements: dict[int, int | str], data: AsyncIterator[memoryview], timeout_s: float
    ) -> Request: ...
