"""An object being received: its bytes on their way to the disk, and the stream that carries them to the peer."""

import asyncio
from collections.abc import Callable
from typing import BinaryIO, TypeVar

from storage.objects.incoming import Incoming
from storage.replication.peering import Peering

T = TypeVar("T")


class Upload:
    """`place(incoming, study)` chooses the volume once the study is known."""

    def __init__(
        self,
        incoming: Incoming,
        stream: int,
        peering: Peering,
        place: Callable[[Incoming, str], None],
    ) -> None:
        self.incoming, self.stream = incoming, stream
        self._peering, self._place = peering, place
        self._completed = False
        self._kept = False

    def place(self, study: str) -> None:
        self._place(self.incoming, study)

    def complete(self) -> None:
        """The last byte has come."""
        if self._completed:
            return
        self._completed = True
        self.incoming.complete()
        self._peering.end_stream(self.stream)

    async def read(self, function: Callable[[BinaryIO], T]) -> T:
        """`function` on the data set of a finished object, in a thread. Raises OSError."""
        return await self.incoming.read(function)

    @property
    def backlogged(self) -> bool:
        link = self._peering.link
        return self.incoming.backlogged or (self.stream != 0 and link is not None and link.backlogged)

    async def room(self) -> None:
        """Wait until neither the disk nor the peer is behind."""
        link = self._peering.link
        if self.stream and link is not None and link.backlogged:
            await link.room()
        while self.incoming.backlogged:
            drained = asyncio.Event()
            self.incoming.on_drained = drained.set
            await drained.wait()

    def keep(self) -> None:
        """An entry of the log names the object now: whatever happens to the sender, it isn't discarded any more."""
        self._kept = True

    async def discard(self) -> None:
        if self._kept:
            return
        self._peering.abort_stream(self.stream)
        await self.incoming.discard()

    async def set_aside(self, reason: str, sop_instance: str) -> None:
        """Keep a refused object in quarantine. It must be finished."""
        if self._kept:
            raise RuntimeError("an entry of the log names it")
        self._peering.abort_stream(self.stream)
        await self.incoming.set_aside(reason, {"sop_instance": sop_instance})
