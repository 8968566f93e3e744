"""One object on its way in: from a modality, from the peer's stream, or fetched from the peer.

Bytes are collected in chunks on the event loop and written, digested and synced by a worker thread, one job at a time
an object; a small object costs one thread hop in all. Memory is bounded: the sender is to pause while `backlogged`.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import xxhash

from storage.volume import Spooled, Volume
from storage.workers import Workers

CHUNK_BYTES: Final = 64 << 10  # what goes to the peer at once
WRITE_BYTES: Final = 512 << 10  # what goes to the disk at once
BACKLOG_BYTES_MAX: Final = 2 * WRITE_BYTES

Tee = Callable[[bytearray], None]


class Incoming:
    def __init__(self, workers: Workers, volume: Volume, header: bytes, tee: Tee | None = None) -> None:
        """`header` is what comes before the data set; `tee` is given each chunk as well (the stream to the peer)."""
        self._workers, self.volume = workers, volume
        self._tee = tee
        self.offset = len(header)
        self.length = len(header)
        self._digest = xxhash.xxh3_128()
        self._queue: list[bytearray | bytes] = [header] if header else []
        self._queued_bytes = 0
        self._chunk = bytearray()
        self._job: asyncio.Future[None] | None = None
        self._spooled: Spooled | None = None
        self._failed: OSError | None = None
        self._finishing: asyncio.Future[bytes] | None = None
        self.first: bytearray | None = None  # the first chunk of the data set, kept to read the identity from
        self.on_drained: Callable[[], None] | None = None

    @property
    def backlogged(self) -> bool:
        """More is waiting for the disk than should be held in memory."""
        return self._queued_bytes > BACKLOG_BYTES_MAX

    @property
    def spool(self) -> str:
        if self._spooled is None:
            raise RuntimeError("not written yet")
        return self._spooled.name

    @property
    def placed(self) -> bool:
        """Something was written, so that the volume can't be changed any more."""
        return self._spooled is not None or self._job is not None

    def feed(self, view: memoryview) -> None:
        """Take over bytes of the data set; they are copied, the view may be reused."""
        chunk = self._chunk
        while len(chunk) + len(view) >= CHUNK_BYTES:
            part = CHUNK_BYTES - len(chunk)
            chunk += view[:part]
            view = view[part:]
            self.feed_chunk(chunk)
            chunk = self._chunk = bytearray()
        chunk += view

    def feed_chunk(self, chunk: bytearray) -> None:
        """Take over a whole chunk without copying it."""
        self.length += len(chunk)
        if self.first is None:
            self.first = chunk
        if self._failed:
            return
        if self._tee:
            self._tee(chunk)
        self._queue.append(chunk)
        self._queued_bytes += len(chunk)
        if self._queued_bytes >= WRITE_BYTES and self._job is None and self._finishing is None:
            self._start_job()

    def _start_job(self) -> None:
        queue, self._queue = self._queue, []
        size = sum(len(chunk) for chunk in queue)
        self._job = self._workers.run(self._write, queue)
        self._job.add_done_callback(lambda job: self._written(job, size))

    def _written(self, job: "asyncio.Future[None]", size: int) -> None:
        self._job = None
        self._queued_bytes -= size
        if not job.cancelled() and isinstance(error := job.exception(), OSError):
            self._failed = error
            self._queue.clear()
            self._queued_bytes = 0
        if self._queued_bytes >= WRITE_BYTES and self._finishing is None:
            self._start_job()
        if self.on_drained and not self.backlogged:
            self.on_drained()

    def _write(self, queue: list[bytearray | bytes]) -> None:
        if self._spooled is None:
            self._spooled = self.volume.create()
        self._spooled.write(queue)
        for number, chunk in enumerate(queue):
            if not (number == 0 and isinstance(chunk, bytes)):  # the header is the only bytes object
                self._digest.update(chunk)

    def complete(self) -> None:
        """The last byte has come: hand over what is still being collected."""
        if self._chunk:
            chunk, self._chunk = self._chunk, bytearray()
            self.feed_chunk(chunk)

    async def finish(self) -> bytes:
        """Make the whole object durable. Returns the digest; raises OSError if the disk failed."""
        return await asyncio.shield(self.begin_finish())

    def begin_finish(self) -> "asyncio.Future[bytes]":
        """Start to make the object durable; `finish` waits for it."""
        if self._finishing is None:
            self._finishing = asyncio.ensure_future(self._finish())
            self._finishing.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._finishing

    async def _finish(self) -> bytes:
        self.complete()
        while self._job is not None:
            await asyncio.wait([self._job])
        if self._failed:
            raise self._failed
        queue, self._queue = self._queue, []
        return await self._workers.run(self._write_and_finish, queue)

    def _write_and_finish(self, queue: list[bytearray | bytes]) -> bytes:
        if queue or self._spooled is None:
            self._write(queue)
        if self._spooled is None:
            raise RuntimeError("nothing spooled")
        self._spooled.finish()
        self._queued_bytes = 0
        return self._digest.digest()

    async def discard(self) -> None:
        """Forget the object; nothing of it stays on the disk."""
        self._queue.clear()
        while self._job is not None:
            await asyncio.wait([self._job])
        if self._finishing:
            await asyncio.wait([self._finishing])
        spooled = self._spooled
        if spooled:
            await self._workers.run(spooled.discard)

    async def set_aside(self, reason: str, detail: dict[str, str]) -> None:
        """Move the finished object to its volume's quarantine."""
        source = self.volume.path / "spool" / self.spool
        await self._workers.run(self.volume.quarantine, source, reason, detail)
