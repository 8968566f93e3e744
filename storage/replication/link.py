"""Between the two gateways: length-prefixed, checksummed frames over TCP. One connection carries the bytes of objects
and the entries that name them, another one all other messages, so that no heartbeat stands in line behind bytes.

    magic 2 | kind 1 | reserved 1 | length 4 | stream 8 | checksum 8, 0 under TLS | payload

Small frames carry messages of the replication core; OPEN, CHUNK, END and ABORT carry the bytes of objects as numbered
streams; FETCH asks for an object. A frame that doesn't check out ends the connection; the handshake that follows
finds where the logs stand. Received payloads are owned buffers, filled by the socket directly.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Final, cast

import xxhash

MAGIC: Final = b"TD"
HEADER: Final = struct.Struct(">2sBxIQQ")
PAYLOAD_BYTES_MAX: Final = 4 << 20
ACKNOWLEDGED: Final = struct.Struct("=120xQ")  # tcpi_bytes_acked
SCRATCH_BYTES: Final = 64 << 10
HIGH_WATER_BYTES: Final = 4 << 20
UNACKNOWLEDGED_S: Final = 30  # a connection whose bytes get no acknowledgement for so long is dead, whatever others do
IDLE_S: Final = 10  # then an idle one is asked


def end_when_dead(sock: socket.socket | None) -> None:
    """A connection can die while another one to the same peer lives: something between has forgotten it."""
    if sock is None:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_S * 1000)


def acknowledged(sock: socket.socket | None) -> int:
    """How many sent bytes the other end's kernel has acknowledged, by tcp_info of linux/tcp.h; 0 if there is none."""
    if sock is None:
        return 0
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, ACKNOWLEDGED.size)
    return int(ACKNOWLEDGED.unpack(info)[0]) if len(info) == ACKNOWLEDGED.size else 0


class Kind(IntEnum):
    MESSAGE = 1
    OPEN = 2  # payload: what comes before the data set
    CHUNK = 3
    END = 4
    ABORT = 5
    FETCH = 6  # payload: seq of the entry; the answer comes as this stream
    MISSING = 7  # answer to FETCH: no copy here either
    SUSPECT = 8  # the bytes that came for this entry weren't those of the record
    LIST = 9  # payload: msgpack (first seq, whether to read the copies, which only); LISTING with this number answers
    LISTING = 10
    USE = 11  # payload: Greeting; this connection is the one in use from now on
    PROBE = 12  # answered with the same number
    CLIENTS = 13  # payload: msgpack, the primary's TCP connections to the virtual addresses
    CONTROL = 14  # payload: Greeting; this connection carries the messages that belong to the one in use
    PLACE = 16  # payload: the study of the object in this stream
    STATE = 17  # payload: msgpack transfer.Ask, or nil for the head; STATE_PART with this number answers
    STATE_PART = 18  # payload: msgpack transfer.Head or Answer; empty if it can't be given now
    CREDIT = 15  # payload: so many bytes of this stream were taken, and as many more may come
    FILE = 19  # payload: msgpack files.mirror.Said; FILE_ANSWER with this number answers, unless it is 0
    FILE_ANSWER = 20  # payload: msgpack files.peer.Answer
    FILE_LOST = 22  # payload: msgpack, inode numbers of which the sender doesn't hold what it should
    FILE_MOVE = 23  # payload: msgpack, inode numbers whose copies on the sender are to leave a volume
    FILE_TAKEN = 21  # stream: a session; payload: so many bytes of its FILEs were carried out


OnFrame = Callable[["Link", Kind, int, bytearray], None]


class Link(asyncio.BufferedProtocol):
    def __init__(self, on_up: Callable[["Link"], None], on_frame: OnFrame, on_down: Callable[["Link"], None]) -> None:
        self._on_up, self._on_frame, self._on_down = on_up, on_frame, on_down
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._scratch = bytearray(SCRATCH_BYTES)
        self._target: bytearray | None = None  # a payload that is being received in place
        self._filled = 0  # bytes in the target, or else in the buffer
        self._kind, self._stream, self._checksum = Kind.MESSAGE, 0, 0
        self._out: list[bytes | bytearray | memoryview] = []
        self._room = asyncio.Event()
        self._room.set()
        self.why_closed = ""
        self.control: Link | None = None  # of the connection in use: where its messages go, past all bytes of objects
        self.received = 0  # bytes
        self._encrypted = False  # TLS looks after every byte
        self.plain_frames = False  # the other node takes frames without a checksum where there is TLS

    # -- sending -----------------------------------------------------------------------------------------------

    @property
    def closing(self) -> bool:
        """Closed or about to be."""
        return self._transport is None or self._transport.is_closing()

    @property
    def certified(self) -> frozenset[str]:
        """The names in the certificate of the other end, none without TLS."""
        shown = self._transport.get_extra_info("peercert") if self._transport else None
        return frozenset(value for kind, value in (shown or {}).get("subjectAltName", ()) if kind == "DNS")

    @property
    def acknowledged(self) -> int:
        """Sent bytes that have arrived at the other end and of which that is known here: both directions work."""
        own = acknowledged(self._transport.get_extra_info("socket")) if not self.closing and self._transport else 0
        return own + (self.control.acknowledged if self.control else 0)

    @property
    def backlogged(self) -> bool:
        return not self._room.is_set()

    async def room(self) -> None:
        """Wait until the peer has taken what was sent."""
        await self._room.wait()

    def send(self, kind: Kind, stream: int, payload: bytes | bytearray | memoryview = b"") -> None:
        if self.closing:
            return
        checksum = 0 if self._encrypted and self.plain_frames else xxhash.xxh3_64_intdigest(payload)
        header = HEADER.pack(MAGIC, kind, len(payload), stream, checksum)
        if not self._out:
            self._loop.call_soon(self._flush)  # what is sent in one turn of the loop leaves, and arrives, together
        self._out += (header, payload)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(out)

    def close(self, why: str) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self.why_closed = self.why_closed or why
            self._transport.abort()

    # -- asyncio -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast(asyncio.Transport, transport)  # uvloop's is one without saying so
        self._transport = stream
        self._encrypted = stream.get_extra_info("ssl_object") is not None
        stream.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        end_when_dead(stream.get_extra_info("socket"))
        self._on_up(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.why_closed = self.why_closed or str(exc or "closed by the peer")
        self._room.set()
        self._on_down(self)

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        """The rest of a long payload is received in its place; anything else goes through a buffer."""
        if self._target is not None:
            return memoryview(self._target)[self._filled :]
        return memoryview(self._scratch)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self.received += nbytes
        self._filled += nbytes
        if self._target is None:
            self._split()
        elif self._filled == len(self._target):
            payload, self._target, self._filled = self._target, None, 0
            self._complete(payload)

    def _split(self) -> None:
        """Take the frames out of the buffer; what is left begins the next one."""
        at, end = 0, self._filled
        while end - at >= HEADER.size and not self.why_closed:
            magic, kind, length, self._stream, self._checksum = HEADER.unpack_from(self._scratch, at)
            if magic != MAGIC or length > PAYLOAD_BYTES_MAX or kind not in Kind._value2member_map_:
                self.close("not a frame of ours")
                return
            self._kind = Kind(kind)
            at += HEADER.size
            here = min(length, end - at)
            if here < length:
                self._target, self._filled = bytearray(length), here
                self._target[:here] = self._scratch[at:end]
                return
            payload = self._scratch[at : at + length]
            at += length
            self._complete(payload)
        self._scratch[: end - at] = self._scratch[at:end]
        self._filled = end - at

    def _complete(self, payload: bytearray) -> None:
        unsummed = self._encrypted and not self._checksum
        if not unsummed and xxhash.xxh3_64_intdigest(payload) != self._checksum:
            self.close("a frame was damaged on the way")
            return
        self._on_frame(self, self._kind, self._stream, payload)

    def eof_received(self) -> bool:
        return False
