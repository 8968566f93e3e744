"""An object being received: its bytes on their way to the disk, and the stream that carries them to the peer."""

import asyncio
from collections.abc import Callable

from storage.objects.incoming import Incoming
from storage.replication.peering import Peering


class Upload:
    """`place(incoming, stream, study)` chooses the volumes once the study is known."""

    def __init__(
        self,
        incoming: Incoming,
        stream: int,
        peering: Peering,
        place: Callable[[Incoming, int, str], None],
    ) -> None:
        self.incoming, self.stream = incoming, stream
        self._peering, self._place = peering, place
        self._completed = False
        self._kept = self._discarded = False

    def place(self, study: str) -> None:
        """It is of this study: both nodes put it where the rest of that lies."""
        self._place(self.incoming, self.stream, study)

    def complete(self) -> None:
        """The last byte has come."""
        if self._completed:
            return
        self._completed = True
        self.incoming.complete()
        self._peering.end_stream(self.stream)

    def feed(self, view: memoryview) -> None:
        """Take over bytes of the data set; they are copied."""
        self.incoming.feed(view)

    @property
    def placed(self) -> bool:
        """Something was written: it stays on the volume that was chosen."""
        return self.incoming.placed

    async def source(self) -> bytes | tuple[str, int]:
        """What is complete, to be read by another process: the data set if it isn't long, else (file, where it begins).
        Raises OSError."""
        data = self.incoming.bytes_in_memory()
        if data is not None:
            return data
        await self.incoming.finish()
        return self.incoming.file, self.incoming.offset

    @property
    def offset(self) -> int:
        """Bytes before the data set."""
        return self.incoming.offset

    @property
    def backlogged(self) -> bool:
        return self.incoming.backlogged or self._peering.is_blocked(self.stream)

    async def room(self) -> None:
        """Wait until neither the disk nor the peer is behind."""
        await self._peering.stream_room(self.stream)
        while self.incoming.backlogged:
            drained = asyncio.Event()
            self.incoming.on_drained = drained.set
            await drained.wait()

    def keep(self) -> None:
        """An entry of the log names the object now: whatever happens to the sender, it isn't discarded any more."""
        self._kept = True

    def keep_here(self) -> None:
        """This node keeps it; the peer doesn't need it."""
        self._kept = True
        self._peering.abort_stream(self.stream)

    def discard_soon(self) -> None:
        """Forget the object, unless it is kept. Nobody has to wait for what a disk does then."""
        if not self._kept and not self._discarded:
            self._discarded = True
            self._peering.abort_stream(self.stream)
            self._peering.discard_soon(self.incoming)

    async def set_aside(self, reason: str, sop_instance: str) -> None:
        """Keep a refused object in quarantine. Raises OSError."""
        if self._kept:
            raise RuntimeError("an entry of the log names it")
        await self.incoming.finish()
        self._peering.abort_stream(self.stream)
        await self.incoming.set_aside(reason, {"sop_instance": sop_instance})
        self._kept = True
