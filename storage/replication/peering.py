"""The other node as this gateway sees it: one link; objects that stream in; objects asked for and given."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
import structlog

from conf.telling import place_of
from storage.objects.copies import Row
from storage.objects.incoming import Incoming
from storage.objects.lookups import Lookups
from storage.objects.volume import NoRoom, Volume
from storage.objects.volumes import Volumes
from storage.replication.giving import WINDOW_BYTES, Giving
from storage.replication.link import Kind, Link
from storage.replication.messages import AnyMessage, Prepare, decode
from storage.replication.messages import encode as encode_message
from storage.replication.network import Network
from storage.replication.routes import Routes
from storage.state.model import Put
from storage.workers import Threads

log = structlog.get_logger()

STREAMS_MAX: Final = 1024
FETCH_STREAM_BIT: Final = 1 << 63
HELD_CHUNKS_MAX: Final = 4
UNCLAIMED_S: Final = 30.0
STALLED_S: Final = 60.0  # nothing of a stream comes or goes
CREDIT_S: Final = 30.0  # longer than a disk is waited for: the peer then takes what it can't keep, and says so
LISTING_S: Final = 300.0


class FetchFailed(Exception):
    """The peer can't give the object now, or the link went away meanwhile."""


class PeerLacksIt(FetchFailed):
    """The peer has no copy of its own."""


class Peering:
    """Callbacks run on the event loop: `on_up`, `on_down(why)`, `on_message(message)`."""

    def __init__(
        self,
        *,
        dial: bool,
        networks: Sequence[Network],
        volumes: Volumes,
        workers: Threads,
        find: Callable[[int], tuple[Volume, str, Put] | None],
        lacks: Callable[[int], bool],
        list_copies: Callable[[int, bool, tuple[int, ...]], list[Row]],
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        on_message: Callable[[AnyMessage], None],
        on_suspect: Callable[[int], None],
        lookups: Lookups,
        from_log: Callable[[int], tuple[Put, bytes] | None],
        look: Callable[[int], tuple[Volume, str, Put] | None],
    ) -> None:
        """`find(seq)` gives this node's copy of an entry, `lacks(seq)` says that there is none and won't be one soon;
        `on_suspect(seq)`: the peer found that copy to be damaged, or it isn't where it should be; `from_log(seq)` gives
        bytes that are on no volume, `look(seq)` a copy that lies here without being known."""
        self.routes = Routes(dial=dial, networks=networks, on_up=self._up, on_frame=self._frame, on_down=self._down)
        self._volumes, self._workers = volumes, workers
        self._on_up, self._on_down = on_up, on_down
        self._on_message, self._on_suspect = on_message, on_suspect
        self._lookups = lookups
        self.on_clients: Callable[[bytes], None] = lambda _: None
        self.on_file: Callable[[Kind, int, bytearray], None] = lambda kind, token, payload: None
        self.give_state: Callable[[bytes], Awaitable[bytes]] | None = None
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self.link: Link | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._incoming: dict[int, Incoming] = {}
        self._ended: dict[int, asyncio.Future[Incoming]] = {}
        self._claimed: set[int] = set()  # somebody waits for these and takes care of what comes
        self._next_stream = 0
        self._held: dict[int, list[bytes | bytearray]] = {}  # streams of which nothing was sent yet
        self._next_fetch = FETCH_STREAM_BIT
        self._ended_at: dict[int, float] = {}
        self._studies: dict[int, str] = {}  # of objects that are held back, or were asked for
        self._windows: dict[int, int] = {}  # streams that we send: bytes that may still be sent
        self._credited = asyncio.Event()
        self._giving = Giving(
            workers,
            volumes,
            self._windows,
            self.stream_room,
            find=find,
            lacks=lacks,
            list_copies=list_copies,
            on_suspect=on_suspect,
            from_log=from_log,
            look=look,
        )
        self._received = 0
        self.on_progress: Callable[[], None] = lambda: None  # the peer has taken bytes

    async def start(self) -> None:
        await self.routes.start()

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        self.routes.stop()
        self.drop("shutting down")

    def drop(self, why: str) -> None:
        if self.link:
            self.link.close(why)
            self._down(self.link)

    def _spawn(self, coroutine: "asyncio._CoroutineLike[None]") -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(coroutine)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: "asyncio.Task[None]") -> None:
        """One that dies of something unforeseen leaves the other node without an answer: the link is made anew."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("peering.failed", error=place_of(error))
            self.drop("an answer couldn't be given")

    def _up(self, link: Link) -> None:
        if self.link is not None:
            self.drop("replaced by a new connection")
        self.link = link
        self._on_up()

    def _down(self, link: Link) -> None:
        if self.link is not link:
            return
        self.link = None
        for stream, future in self._ended.items():
            if not future.done():
                future.set_exception(FetchFailed(link.why_closed))
                future.exception()  # seen here; whoever still waits sees it too
            elif not future.exception() and stream not in self._claimed:
                self._spawn(future.result().discard())
        for incoming in self._incoming.values():
            self._spawn(incoming.discard())
        for waiting in self._asked.values():
            if not waiting.done():
                waiting.set_exception(FetchFailed(link.why_closed))
        self._asked.clear()
        self._incoming.clear()
        self._ended.clear()
        self._held.clear()
        self._studies.clear()
        self._windows.clear()
        self._ended_at.clear()
        self._credited.set()
        self._on_down(link.why_closed)

    # -- sending -----------------------------------------------------------------------------------------------

    def send(self, message: AnyMessage) -> None:
        """An entry follows the bytes that it names; all other messages go past them."""
        if self.link:
            way = self.link if isinstance(message, Prepare) else self.link.control or self.link
            way.send(Kind.MESSAGE, 0, encode_message(message))

    def send_clients(self, encoded: bytes) -> None:
        """Tell the peer's HA agent, through its gateway, who is connected here: `on_clients` there."""
        if self.link:
            (self.link.control or self.link).send(Kind.CLIENTS, 0, encoded)

    def heard(self) -> bool:
        """Something came from the peer since this was asked last, if only a part of a message."""
        link = self.link
        received = link.received + (link.control.received if link.control else 0) if link else 0
        before, self._received = self._received, received
        return received > before > 0

    def open_stream(self, header: bytes) -> int:
        """Start to stream an object to the peer; returns the stream's number, 0 without a link."""
        if self.link is None:
            return 0
        self._next_stream += 1
        self._held[self._next_stream] = [header]
        self._windows[self._next_stream] = WINDOW_BYTES
        return self._next_stream

    def is_blocked(self, stream: int) -> bool:
        """The peer is behind with this stream: no more of it should be read from whoever sends it."""
        return self.link is not None and self._windows.get(stream, 1) <= 0

    async def stream_room(self, stream: int) -> None:
        """Wait until the peer has taken what was sent of a stream, or the link has ended. A link over which nothing of
        any stream is taken is ended: no entry waits for it that would show it."""
        while self.is_blocked(stream):
            link = self.link
            self._credited.clear()
            try:
                async with asyncio.timeout(CREDIT_S):
                    await self._credited.wait()
            except TimeoutError:
                if link is self.link:
                    self.drop("nothing that is sent is taken")

    def chunk(self, stream: int, chunk: bytearray) -> None:
        if stream in self._windows:
            self._windows[stream] -= len(chunk)
        held = self._held.get(stream)
        if held is not None and len(held) <= HELD_CHUNKS_MAX:
            held.append(chunk)
        elif self.link:
            self._let_go(stream)
            self.link.send(Kind.CHUNK, stream, chunk)

    def place_stream(self, stream: int, study: str) -> None:
        """The object is of this study. A small one isn't told of it by the stream: its entry says it in time."""
        if stream in self._held:
            self._studies[stream] = study
        elif self.link and stream:
            self.link.send(Kind.PLACE, stream, study.encode())

    def _let_go(self, stream: int) -> None:
        """A small object is held back until it is complete: the peer wakes once for it and its entry."""
        held = self._held.pop(stream, None)
        if held and self.link:
            self.link.send(Kind.OPEN, stream, held[0])
            if study := self._studies.pop(stream, ""):
                self.link.send(Kind.PLACE, stream, study.encode())
            for chunk in held[1:]:
                self.link.send(Kind.CHUNK, stream, chunk)

    def end_stream(self, stream: int) -> None:
        self._studies.pop(stream, None)
        self._let_go(stream)
        self._windows.pop(stream, None)
        if self.link:
            self.link.send(Kind.END, stream)

    def release(self) -> None:
        """Nobody waits any more until the peer takes what was sent: this node doesn't serve now."""
        for stream in [stream for stream in self._windows if not stream & FETCH_STREAM_BIT]:
            del self._windows[stream]
        self._credited.set()

    def abort_stream(self, stream: int) -> None:
        self._windows.pop(stream, None)
        self._studies.pop(stream, None)
        self._credited.set()
        if self._held.pop(stream, None) is None and self.link and stream:
            self.link.send(Kind.ABORT, stream)

    # -- receiving ---------------------------------------------------------------------------------------------

    def ended(self, stream: int) -> Incoming | None:
        """The object of a stream whose last byte is here."""
        future = self._ended.get(stream)
        return future.result() if future and future.done() and not future.exception() else None

    def discard_soon(self, incoming: Incoming) -> None:
        """Nobody wants this object any more."""
        self._spawn(incoming.discard())

    def forget(self, stream: int) -> None:
        self._ended.pop(stream, None)

    async def received(self, stream: int) -> Incoming:
        """The object of a stream once its last byte is here; raises FetchFailed."""
        future = self._ended.get(stream)
        if future is None:
            raise FetchFailed("no such stream")
        self._claimed.add(stream)
        try:
            while True:
                coming = self._incoming.get(stream)
                before = coming.length if coming else -1
                try:
                    async with asyncio.timeout(STALLED_S):
                        return await asyncio.shield(future)
                except TimeoutError:
                    coming = self._incoming.get(stream)
                    if (coming.length if coming else -1) == before:
                        raise FetchFailed("nothing of it comes any more") from None
        except BaseException:
            future.add_done_callback(self._unwanted)  # nobody else would let go of it
            raise
        finally:
            self._ended.pop(stream, None)
            self._studies.pop(stream, None)
            self._claimed.discard(stream)

    def _unwanted(self, ended: "asyncio.Future[Incoming]") -> None:
        if not ended.cancelled() and not ended.exception():
            self._spawn(ended.result().discard())

    async def fetch(self, seq: int, study: str) -> Incoming:
        """Ask the peer for its copy of an entry, an object of this study; raises FetchFailed."""
        with contextlib.suppress(NoRoom):  # said once more when it comes
            await self._lookups.look_for(study)
        link = self.link
        if link is None:
            raise FetchFailed("no link")
        self._next_fetch += 1
        stream = self._next_fetch
        self._ended[stream] = asyncio.get_running_loop().create_future()
        self._studies[stream] = study
        link.send(Kind.FETCH, stream, seq.to_bytes(8, "big"))
        return await self.received(stream)

    def suspect(self, seq: int) -> None:
        """Tell the peer that what it gave for this entry wasn't good."""
        if self.link:
            self.link.send(Kind.SUSPECT, seq)

    def _frame(self, link: Link, kind: Kind, stream: int, payload: bytearray) -> None:
        if self.link is None or link not in (self.link, self.link.control):
            return
        try:
            self._take(link, kind, stream, payload)
        except msgspec.DecodeError:
            link.close("a message that isn't ours")

    def _take(self, link: Link, kind: Kind, stream: int, payload: bytearray) -> None:
        match kind:
            case Kind.MESSAGE:
                self._on_message(decode(payload))
            case Kind.OPEN:
                self._open(link, stream, bytes(payload))
            case Kind.CHUNK:
                incoming = self._incoming.get(stream)
                if incoming is None or incoming.is_lost:
                    self._credit(stream, len(payload))  # nobody takes it: whoever sends it needn't wait for that
                else:
                    incoming.feed_chunk(payload)
            case Kind.PLACE:
                incoming = self._incoming.get(stream)
                if incoming and not incoming.placed:
                    with contextlib.suppress(NoRoom):  # it stays where it was to go
                        self._lookups.place(incoming, payload.decode("utf-8", "replace"))
            case Kind.END:
                self._end(stream)
            case Kind.ABORT:
                if incoming := self._incoming.pop(stream, None):
                    self._spawn(incoming.discard())
                self._abandon(stream)
            case Kind.FETCH:
                self._spawn(self._giving.copy(link, stream, int.from_bytes(payload, "big")))
            case Kind.MISSING:
                self._fail(stream, PeerLacksIt("the peer doesn't have it"))
            case Kind.SUSPECT:
                self._on_suspect(stream)
            case Kind.LIST:
                asked = msgspec.msgpack.decode(payload, type=tuple[int, bool, tuple[int, ...]])
                self._spawn(self._giving.listing(link, stream, *asked))
            case Kind.STATE:
                self._spawn(self._give_state(link, stream, bytes(payload)))
            case Kind.LISTING | Kind.STATE_PART:
                waiting = self._asked.get(stream)
                if waiting and not waiting.done():
                    waiting.set_result(bytes(payload))
            case Kind.CLIENTS:
                self.on_clients(bytes(payload))
            case Kind.FILE | Kind.FILE_ANSWER | Kind.FILE_TAKEN | Kind.FILE_LOST | Kind.FILE_MOVE:
                self.on_file(kind, stream, payload)
            case Kind.CREDIT:
                if stream in self._windows:
                    self._windows[stream] += int.from_bytes(payload, "big")
                self._credited.set()
                self.on_progress()

    def _open(self, link: Link, stream: int, header: bytes) -> None:
        if len(self._incoming) >= STREAMS_MAX or stream in self._incoming:
            link.close("too many streams, or one of them twice")
            return
        if not stream & FETCH_STREAM_BIT:
            self._ended[stream] = asyncio.get_running_loop().create_future()
        study = self._studies.pop(stream, "") if stream & FETCH_STREAM_BIT else ""
        try:
            volume = self._volumes.place(study) if study else self._volumes.choose()
        except NoRoom:
            self._fail(stream, FetchFailed("no room here"))
            return
        incoming = self._incoming[stream] = Incoming(self._workers, self._volumes, volume, header)
        incoming.on_taken = lambda count: self._credit(stream, count)

    def _credit(self, stream: int, count: int) -> None:
        """Memory stays bounded, stream by stream: a slow disk slows down what goes to it, and nothing else."""
        if self.link and count:
            (self.link.control or self.link).send(Kind.CREDIT, stream, count.to_bytes(8, "big"))

    def _end(self, stream: int) -> None:
        incoming, future = self._incoming.pop(stream, None), self._ended.get(stream)
        if incoming is None:
            return
        if future is None or future.done():
            self._spawn(incoming.discard())
            return
        if not incoming.in_memory:
            incoming.begin_finish()  # the disk starts now, before the entry comes
        future.set_result(incoming)
        self._ended_at[stream] = asyncio.get_running_loop().time()

    def expire(self) -> None:
        """Let go of what came and isn't named by any entry: its entry was here already, or never came. Should one name
        it later, it is fetched."""
        now = asyncio.get_running_loop().time()
        for stream in [one for one, at in self._ended_at.items() if now - at > UNCLAIMED_S]:
            del self._ended_at[stream]
            future = self._ended.get(stream)
            if stream not in self._claimed and future is not None and future.done() and future.exception() is None:
                del self._ended[stream]
                self._spawn(future.result().discard())

    def _abandon(self, stream: int) -> None:
        """The sender gave the object up, perhaps after its last byte (it had it already)."""
        future = self._ended.get(stream)
        if future is not None and future.done() and future.exception() is None:
            self._ended.pop(stream)
            self._spawn(future.result().discard())
        else:
            self._fail(stream, FetchFailed("aborted by the peer"))

    def _fail(self, stream: int, error: FetchFailed) -> None:
        future = self._ended.get(stream)
        if future is not None and not future.done():
            future.set_exception(error)
            future.exception()

    # -- giving ------------------------------------------------------------------------------------------------

    async def listing(self, start: int, *, read: bool, only: Sequence[int] = ()) -> list[Row]:
        """What the peer holds from entry `start` on, some hundreds, or of `only` these; raises FetchFailed."""
        asked = msgspec.msgpack.encode((start, read, tuple(only)))
        try:
            return msgspec.msgpack.decode(await self.ask(Kind.LIST, asked, LISTING_S), type=list[Row])
        except msgspec.DecodeError as error:
            raise FetchFailed(f"no list: {error}") from error

    async def ask(self, kind: Kind, payload: bytes, patience_s: float) -> bytes:
        """What the peer answers to that; raises FetchFailed."""
        link = self.link
        if link is None:
            raise FetchFailed("no link to the other node")
        self._next_stream += 1
        stream = self._next_stream
        waiting: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[stream] = waiting
        link.send(kind, stream, payload)
        try:
            async with asyncio.timeout(patience_s):
                return await waiting
        except TimeoutError:
            raise FetchFailed("the other node doesn't answer in time") from None
        finally:
            self._asked.pop(stream, None)

    async def _give_state(self, link: Link, stream: int, asked: bytes) -> None:
        answer = await self.give_state(asked) if self.give_state else b""
        link.send(Kind.STATE_PART, stream, answer)
