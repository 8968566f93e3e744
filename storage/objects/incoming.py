"""One object on its way in: from a modality, from the peer's stream, or fetched from the peer.

Bytes are collected in chunks on the event loop and written, digested and synced by a worker thread, one job at a time
an object; a small object costs one thread hop in all. Memory is bounded: the sender is to pause while `backlogged`.
An object that is still in memory as a whole when its disk fails is written again on another volume.
"""

import asyncio
import contextlib
import errno
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final, Protocol

import xxhash

from storage import crash
from storage.objects.blob_store import Spooled
from storage.objects.blocks import BLOCK_BYTES, BlockDigests
from storage.objects.volume import NoRoom, Volume, set_aside
from storage.state import description
from storage.state.model import Location
from storage.workers import Threads, within

CHUNK_BYTES: Final = 64 << 10  # what goes to the peer at once
WRITE_BYTES: Final = 1 << 20  # what goes to the disk at once; up to this an object stays in memory until it is durable
INLINE_BYTES_MAX: Final = 640 << 10  # up to this the log takes the bytes themselves, measured by `tools/bench log`
BACKLOG_BYTES_MAX: Final = 2 * WRITE_BYTES
DISCARD_S: Final = 30.0

Tee = Callable[[bytearray], None]


class Placement(Protocol):
    """Where objects go, and who is told of a disk that failed."""

    on_their_way: "weakref.WeakSet[Incoming]"

    def choose(self, prefer: str = "", avoid: str = "") -> Volume: ...
    def serves(self, volume_id: str) -> bool: ...
    def failed(self, volume_id: str, error: OSError) -> None: ...
    def took(self, volume_id: str, seconds: float) -> None: ...


class Incoming:
    def __init__(
        self, workers: Threads, placement: Placement, volume: Volume, header: bytes, tee: Tee | None = None
    ) -> None:
        """`header` is what comes before the data set; `tee` is given each chunk as well (the stream to the peer)."""
        self._workers, self._placement, self.volume = workers, placement, volume
        self._loop = asyncio.get_running_loop()
        self._tee = tee
        placement.on_their_way.add(self)
        self.offset = len(header)
        self.length = len(header)
        self._digest = xxhash.xxh3_128()
        self._blocks: BlockDigests | None = None  # of one that is longer than a block
        self._queue: list[bytearray | bytes] = [header] if header else []
        self._queued_bytes = len(header)
        self._chunk = bytearray()
        self._job: asyncio.Future[Spooled] | None = None
        self._spooled: Spooled | None = None
        self._failed: OSError | None = None
        self._finishing: asyncio.Future[bytes] | None = None
        self._digested = False
        self._given_up = self._described = False
        self._held = False  # it is being looked up where it is to go
        self._partly = False  # some of it was handed to the disk and isn't in memory any more
        self._attempt = 0  # of the jobs: what an earlier one does when its disk lets go of it is for nothing
        self._guard = threading.Lock()
        self._since: float | None = None  # when the job began that a thread is at
        self.on_taken: Callable[[int], None] | None = None  # so many bytes were written
        self.on_drained: Callable[[], None] | None = None

    @property
    def backlogged(self) -> bool:
        """More is waiting for the disk than should be held in memory."""
        return self._queued_bytes > BACKLOG_BYTES_MAX

    @property
    def is_lost(self) -> bool:
        """It can't become whole any more: what still comes of it is let go."""
        return self._failed is not None or self._given_up

    @property
    def written(self) -> bool:
        """There is a file of it."""
        return self._spooled is not None

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
        if self._failed or self._given_up:
            return
        if self._tee:
            self._tee(chunk)
        self._queue.append(chunk)
        self._queued_bytes += len(chunk)
        if self._queued_bytes > WRITE_BYTES and self._job is None and self._finishing is None and not self._held:
            self._start_job()

    def hold(self) -> None:
        """Write nothing before `go_to`."""
        self._held = not self.placed

    def go_to(self, volume: Volume | None) -> None:
        """It goes to this volume, if nothing was written of it meanwhile; None: where it was to go."""
        if not self._held:
            return
        self._held = False
        with self._guard:
            if volume and not self.placed:
                self.volume = volume
        if self._finishing is not None:
            self._start_last()
        elif self._queued_bytes > WRITE_BYTES and not self._given_up:
            self._start_job()

    def _start_job(self) -> None:
        queue, self._queue = self._queue, []
        self._partly = True
        size = sum(len(chunk) for chunk in queue)
        attempt = self._attempt
        self._job = self._workers.run(self._write, queue, attempt)
        self._job.add_done_callback(lambda job: self._written(job, size, attempt))

    def _written(self, job: "asyncio.Future[Spooled]", size: int, attempt: int) -> None:
        if attempt != self._attempt:
            seen(job)
            return
        self._job = self._since = None
        self._queued_bytes -= size
        if not job.cancelled() and isinstance(error := job.exception(), OSError):
            self._failed = error
            self._placement.failed(self.volume.id, error)
            size += self._let_go()
        if self._finishing is not None:
            self._start_last()
        elif self._queued_bytes > WRITE_BYTES and not self._given_up:
            self._start_job()
        if self.on_taken:
            self.on_taken(size)
        if self.on_drained and not self.backlogged:
            self.on_drained()

    def _write(self, queue: list[bytearray | bytes], attempt: int, digest: bool = True) -> Spooled:
        self._begin(attempt)
        if digest:
            self._update_digest(queue)
        spooled = self._spooled
        if spooled is None:
            spooled = self.volume.create()
            with self._guard:
                self._check(attempt)
                self._spooled = spooled
        spooled.write(queue)
        return spooled

    def _begin(self, attempt: int) -> None:
        """The thread comes to this job now; what it waited for before says nothing of this disk. Raises OSError."""
        with self._guard:
            self._check(attempt)
            self._since = self._loop.time()

    def _came_back(self, attempt: int) -> None:
        with self._guard:
            if attempt == self._attempt:
                self._since = None

    def _check(self, attempt: int) -> None:
        if attempt != self._attempt:
            raise OSError(errno.EAGAIN, "the disk answered too late")

    def _let_go(self) -> int:
        """Forget what waits for the disk; returns its bytes."""
        left, self._queued_bytes = max(0, self._queued_bytes), 0
        self._queue.clear()
        return left

    # -- a disk that hangs ---------------------------------------------------------------------------------------

    def stuck_for(self, now: float) -> float:
        """Seconds that a thread has been at its job, 0 if none is. `now`: the loop's time."""
        since = self._since
        return 0.0 if since is None else now - since

    @property
    def waits(self) -> bool:
        """It waits for its disk."""
        return self._job is not None or (self._finishing is not None and not self._finishing.done())

    def leave_disk(self) -> None:
        """The disk hangs. An object that is in memory as a whole goes to another one, any other fails."""
        error = OSError(errno.ETIMEDOUT, "the disk doesn't answer")
        try:
            self.restart()
        except (OSError, NoRoom) as raised:
            self._failed = error
            left = self._let_go()  # also without a listener: whoever feeds it waits for the backlog to go
            if self.on_taken:
                self.on_taken(left)
            self._end(raised if isinstance(raised, NoRoom) else error)
            if self.on_drained:
                self.on_drained()
            return
        if self._finishing is not None:
            self._start_last()

    @property
    def attempt(self) -> int:
        """How often it was restarted."""
        return self._attempt

    def restart(self) -> int:
        """Forget what was written: the object is still in memory as a whole, and goes to a disk that is in service now.
        Returns the number of this attempt. Raises OSError for one that isn't in memory, NoRoom."""
        with self._guard:
            self._attempt += 1
            self._since, self._held = None, False
            whole = not self._partly
            if whole:
                self._spooled = None
        self._job = None
        if not whole:
            raise OSError(errno.ETIMEDOUT, "the disk doesn't answer")
        self.volume = self._placement.choose()
        return self._attempt

    def _update_digest(self, queue: list[bytearray | bytes]) -> None:
        chunks = [chunk for number, chunk in enumerate(queue) if number or not isinstance(chunk, bytes)]
        if not self._digested and (self._partly or sum(map(len, chunks)) > BLOCK_BYTES):  # else it is short
            self._blocks = BlockDigests()
        self._digested = True
        for chunk in chunks:  # the header is the only bytes object
            self._digest.update(chunk)
            if self._blocks:
                self._blocks.update(chunk)

    def complete(self) -> None:
        """The last byte has come: hand over what is still being collected."""
        if self._chunk:
            chunk, self._chunk = self._chunk, bytearray()
            self.feed_chunk(chunk)

    # -- the end -----------------------------------------------------------------------------------------------

    async def finish(self) -> bytes:
        """Make the whole object durable. Returns the digest; raises OSError if the disk failed."""
        return await asyncio.shield(self.begin_finish())

    def begin_finish(self) -> "asyncio.Future[bytes]":
        """Start to make the object durable; `finish` waits for it."""
        if self._finishing is None:
            self.complete()
            self._finishing = asyncio.get_running_loop().create_future()
            self._finishing.add_done_callback(lambda done: done.cancelled() or done.exception())
            if self._job is None and not self._held:
                self._start_last()
        return self._finishing

    @property
    def digest(self) -> bytes:
        """Of what was digested up to now: of the whole object after `finish` or `digest_at_once`."""
        return self._digest.digest()

    @property
    def blocks(self) -> bytes:
        """Digests of the blocks of a long object, as `digest`; b"" for one that isn't."""
        return self._blocks.digests() if self._blocks and self.length - self.offset > BLOCK_BYTES else b""

    def bytes_in_memory(self) -> bytes | None:
        """The whole data set, if none of it was written yet."""
        if not self.in_memory:
            return None
        self.complete()
        return b"".join(self._queue[1:] if self.offset else self._queue) if self.in_memory else None

    @property
    def in_memory(self) -> bool:
        """Every byte of it is here and none on its way to the disk."""
        return not self.placed and self._finishing is None and self._failed is None

    def digest_at_once(self) -> bytes | None:
        """The digest of a complete object before it is durable, None unless it is `in_memory`."""
        if not self.in_memory:
            return None
        self.complete()
        if not self.in_memory:
            return None
        if not self._digested:
            self._update_digest(self._queue)
        return self._digest.digest()

    def inline(self) -> "list[bytearray | bytes] | None":
        """The bytes of a complete object that the log takes: it is in memory as a whole, and short."""
        if self.length + len(self._chunk) > INLINE_BYTES_MAX or not self.in_memory:
            return None
        self._held = False  # the journal looks where it is to go
        self.complete()
        return list(self._queue) if self.in_memory else None

    def describe(self, packed: bytes) -> bool:
        """Have the file of an object that is in memory say what it is. Returns whether there is room for that."""
        if self.offset and self._queue and isinstance(header := self._queue[0], bytes):
            self._queue[0] = description.with_description(header, packed)
            self._described = description.has_room(header)
        return self._described

    def land_here(self, attempt: int, *, sync: bool = True) -> None:
        """Write an object that is in memory to a volume in this thread, durably if `sync`; raises OSError or NoRoom if
        no volume takes it, and OSError (EAGAIN) if it was restarted since."""
        self._begin(attempt)
        queue, digested = self._queue, self._digested
        if self._spooled is None and not self._placement.serves(self.volume.id):
            self._aim(self._placement.choose(), attempt)
        while True:
            volume = self.volume
            try:
                self._write_and_finish(queue, attempt, digest=not digested, sync=sync)
                self._came_back(attempt)
                return
            except OSError as error:
                self._came_back(attempt)
                self._placement.failed(volume.id, error)  # also when this thread was left behind long ago
                if attempt != self._attempt:
                    raise
                digested = True
                self._move_on(error, attempt)

    def aim(self, volume: Volume, attempt: int) -> None:
        """Have it go there, unless it was written already. Raises OSError (EAGAIN) if it was restarted since."""
        if self._spooled is None:
            self._aim(volume, attempt)

    def _move_on(self, error: OSError, attempt: int) -> None:
        """To another volume than the one that just failed; raises the error if there is none."""
        broken = self._spooled
        try:
            volume = self._placement.choose(avoid=self.volume.id)
        except NoRoom:
            if self._placement.serves(self.volume.id):
                raise error from None
            raise
        self._aim(volume, attempt)
        if broken:
            _discard(broken)

    def _aim(self, volume: Volume, attempt: int) -> None:
        """Raises OSError for an attempt that isn't the present one: what it aims at is for nothing."""
        with self._guard:
            self._check(attempt)
            self.volume, self._spooled = volume, None

    def _start_last(self) -> None:
        """Write what is left and sync."""
        if self._failed:
            self._end(self._failed)
            return
        attempt = self._attempt
        if self._spooled is None:
            job = self._workers.run(self.land_here, attempt)
        else:
            queue, self._queue = self._queue, []
            self._partly = True
            job = self._workers.run(self._write_and_finish, queue, attempt)
        job.add_done_callback(lambda done: self._last_written(done, attempt))

    def _write_and_finish(
        self, queue: list[bytearray | bytes], attempt: int, digest: bool = True, sync: bool = True
    ) -> None:
        self._begin(attempt)
        spooled, volume = self._spooled, self.volume
        if queue or spooled is None:
            spooled = self._write(queue, attempt, digest)
        crash.point("incoming.before_fsync")
        start = time.monotonic()
        spooled.finish(b"" if self._described else self._digest.digest(), sync=sync)
        if sync:
            volume.sync_spool()  # its name as well
        if attempt == self._attempt:  # a thread that was left behind has nothing to say of its successor's disk
            self._placement.took(volume.id, time.monotonic() - start)
        crash.point("incoming.after_fsync")

    def _last_written(self, job: "asyncio.Future[None]", attempt: int) -> None:
        if attempt != self._attempt:
            seen(job)
            return
        self._since = None
        self._queue = []
        self._queued_bytes = 0
        error = job.exception()
        if isinstance(error, OSError):
            self._placement.failed(self.volume.id, error)
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        finishing = self._finishing
        if finishing is None or finishing.done():
            return
        if error:
            finishing.set_exception(error)
        else:
            finishing.set_result(self._digest.digest())

    # -- giving up ---------------------------------------------------------------------------------------------

    async def discard(self) -> None:
        """Forget the object; nothing of it stays on the disk. Blocks no longer than `DISCARD_S` for each of two steps;
        the second of two calls returns at once."""
        if self._given_up:
            return
        self._given_up = True
        self._placement.on_their_way.discard(self)  # what stays of it on a disk that hangs is swept up
        left = self._let_go()
        if self.on_taken:
            self.on_taken(left)
        if self.on_drained:
            self.on_drained()
        try:
            async with asyncio.timeout(DISCARD_S):
                while self._job is not None:
                    await asyncio.wait([self._job])
                if self._finishing:
                    await asyncio.wait([self._finishing])
        except TimeoutError:
            return  # its disk hangs; what is there is swept up once it answers
        spooled = self._spooled
        if spooled:
            with contextlib.suppress(OSError):  # a disk that hangs keeps it; the sweep sets it aside
                await within(self._workers.run(_discard, spooled), DISCARD_S)

    async def set_aside(self, reason: str, detail: dict[str, str]) -> None:
        """Move the finished object to its volume's quarantine."""
        await self._workers.run(self._quarantine, reason, detail)

    def _quarantine(self, reason: str, detail: dict[str, str]) -> None:
        set_aside(self.volume, f"spool/{self.spool}", reason, detail)

    @property
    def file(self) -> str:
        """Where it lies before it is published."""
        return str(self.volume.path / "spool" / self.spool)

    @property
    def location(self) -> Location:
        """Where it lies once it is finished."""
        return Location(self.volume.id, self.spool, "")


def _discard(spooled: Spooled) -> None:
    with contextlib.suppress(OSError):  # on a failed disk it stays; recovery tidies the spool
        spooled.discard()


def seen(job: "asyncio.Future[Any]") -> None:
    """Its error is nobody's business any more."""
    if not job.cancelled():
        job.exception()
