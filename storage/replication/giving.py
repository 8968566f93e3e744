"""What the other node asks of this one's copies: an object's bytes, and what there is."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import structlog

from storage.objects.blob_store import Reader
from storage.objects.copies import Row
from storage.objects.volume import Volume
from storage.objects.volumes import Volumes
from storage.replication.link import Kind, Link
from storage.state.model import Put
from storage.workers import Threads, within

log = structlog.get_logger()

READ_BYTES: Final = 256 << 10
BEGIN_BYTES: Final = 1 << 20  # read in one go
FETCHES_SERVED_MAX: Final = 8
WINDOW_BYTES: Final = 4 << 20  # of one stream, sent and not taken by the other node's disk
READ_S: Final = 30.0  # that a disk may take for one block, with all that is read from it before
STALLED_S: Final = 60.0  # nothing of a stream comes or goes


Begun = tuple[Volume | None, bytes, bytes, Reader | None]  # header, first bytes, and the file if there is more of it


class Giving:
    """`windows`: of each stream that is sent, the bytes that may still be; `stream_room(stream)` waits for some."""

    def __init__(
        self,
        workers: Threads,
        volumes: Volumes,
        windows: dict[int, int],
        stream_room: Callable[[int], Awaitable[None]],
        *,
        find: Callable[[int], tuple[Volume, str, Put] | None],
        lacks: Callable[[int], bool],
        list_copies: Callable[[int, bool, tuple[int, ...]], list[Row]],
        on_suspect: Callable[[int], None],
        from_log: Callable[[int], tuple[Put, bytes] | None],
        look: Callable[[int], tuple[Volume, str, Put] | None],
    ) -> None:
        """As in `Peering`."""
        self._workers, self._volumes, self._windows, self._stream_room = workers, volumes, windows, stream_room
        self._find, self._lacks, self._list, self._on_suspect = find, lacks, list_copies, on_suspect
        self._from_log, self._look = from_log, look
        self._serving = asyncio.Semaphore(FETCHES_SERVED_MAX)

    async def listing(self, link: Link, stream: int, start: int, read: bool, only: tuple[int, ...]) -> None:
        """What this node holds from entry `start` on, or of `only` these."""
        rows = await self._workers.run(lambda: self._list(start, read, only))
        link.send(Kind.LISTING, stream, msgspec.msgpack.encode(rows))

    async def copy(self, link: Link, stream: int, seq: int) -> None:
        """The bytes of an entry's copy, as a stream."""
        async with self._serving:
            reading = self._workers.run(self._begin_reading, seq)
            try:
                begun = await within(reading, READ_S)
            except OSError:
                reading.add_done_callback(_close_late)
                link.send(Kind.ABORT, stream)  # its disk hangs; nothing is wrong with the copy as far as is known
                return
            if isinstance(begun, Kind):
                link.send(begun, stream)
                if begun is Kind.ABORT:
                    self._on_suspect(seq)
                return
            volume, header, block, file = begun
            try:
                link.send(Kind.OPEN, stream, header)
                self._windows[stream] = WINDOW_BYTES
                while block and not link.closing:
                    for at in range(0, len(block), READ_BYTES):
                        link.send(Kind.CHUNK, stream, memoryview(block)[at : at + READ_BYTES])
                    self._windows[stream] = self._windows.get(stream, 0) - len(block)
                    await link.room()
                    async with asyncio.timeout(STALLED_S):
                        await self._stream_room(stream)
                    block = await within(self._workers.run(file.read, BEGIN_BYTES), READ_S) if file else b""
                link.send(Kind.END, stream)
            except TimeoutError:
                log.warning("fetch.stalled", seq=seq)
                link.send(Kind.ABORT, stream)
            except OSError as error:
                log.error("fetch.unreadable", seq=seq, error=error.strerror)
                if volume and error.errno != errno.ETIMEDOUT:
                    self._volumes.failed(volume.id, error)
                link.send(Kind.ABORT, stream)
            finally:
                self._windows.pop(stream, None)
                if file:
                    file.close()

    def _begin_reading(self, seq: int) -> Begun | Kind:
        """Header, first bytes, and the file if there is more of it; or what to answer instead. In one thread hop."""
        found = self._find(seq) or self._look(seq)
        if found is None and (kept := self._from_log(seq)) is not None:
            put, data = kept
            return None, data[: put.offset], data[put.offset :], None
        if found is None:
            return Kind.MISSING if self._lacks(seq) else Kind.ABORT
        volume, name, put = found
        file = None
        try:
            file = volume.open(name)
            header, block = file.read(put.offset), file.read(BEGIN_BYTES)
        except OSError as error:
            if file:
                file.close()
            if not isinstance(error, FileNotFoundError):  # that one was only moved just now
                self._volumes.failed(volume.id, error)
            return Kind.ABORT
        if len(header) + len(block) < put.length:
            return volume, header, block, file
        file.close()
        return volume, header, block, None


def _close_late(reading: "asyncio.Future[Begun | Kind]") -> None:
    """Its disk answered when nobody waited any more."""
    if (
        not reading.cancelled()
        and not reading.exception()
        and isinstance(begun := reading.result(), tuple)
        and begun[3]
    ):
        begun[3].close()
