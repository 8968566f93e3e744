"""TCP between the two simulated gateways: bytes in order until a cable or an end fails."""

import asyncio
import errno
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from storage.replication.link import UNACKNOWLEDGED_S
from tests.simulation.virtual import Process

if TYPE_CHECKING:
    from tests.simulation.world import World


PACKET_BYTES = 1500


class End:
    """One end of a connection, as the transport of a protocol."""

    def __init__(self, world: "World", node: str, peer: str, process: Process) -> None:
        self.world, self.node, self.peer, self.process = world, node, peer, process
        self.other: End | None = None
        self.protocol: Any = None
        self._closed = False
        self._stuck = False
        self._arrives = 0.0
        self._paused = False
        self._held: list[bytes] = []

    @property
    def stuck(self) -> bool:
        """What is sent doesn't arrive, and nobody has noticed yet."""
        return self._stuck and not self._closed

    def writelines(self, buffers: Iterable[bytes | bytearray | memoryview]) -> None:
        data = b"".join(bytes(buffer) for buffer in buffers)
        if not self._stuck and not self.world.paths[self.node, self.peer].up:
            self._stuck = True
            self.world.loop.post(self.process, UNACKNOWLEDGED_S, self.abort)
        if self._closed or self._stuck or self.other is None:
            return  # what follows can't overtake what is stuck
        rng, loop = self.world.rng, self.world.loop
        delay = 0.0003 if rng.random() < 0.98 else rng.random()
        self._arrives = max(self._arrives + 1e-6, loop.now + delay)
        if not self.world.wire_bytes_s:
            loop.post(self.other.process, self._arrives - loop.now, self.other.receive, data)
            return
        for at in range(0, len(data), PACKET_BYTES):  # what is sent at once doesn't arrive at once
            packet = data[at : at + PACKET_BYTES]
            self._arrives += len(packet) / self.world.wire_bytes_s
            loop.post(self.other.process, self._arrives - loop.now, self.other.receive, packet)

    def receive(self, data: bytes) -> None:
        if self._closed or self.protocol is None:
            return
        if self._paused:
            self._held.append(data)
            return
        view = memoryview(data)
        while view and not self._closed:
            buffer = self.protocol.get_buffer(len(view))
            count = min(len(buffer), len(view))
            buffer[:count] = view[:count]
            view = view[count:]
            self.protocol.buffer_updated(count)

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        held, self._held = self._held, []
        for number, data in enumerate(held):
            if self._paused:
                self._held += held[number:]
                return
            self.receive(data)

    def get_extra_info(self, name: str) -> None:
        """There is no socket."""

    def is_closing(self) -> bool:
        return self._closed

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def abort(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self.protocol is not None:
            self.world.loop.post(self.process, 0.0001, self.protocol.connection_lost, None)
        self.tell_other()

    def tell_other(self) -> None:
        """The kernel closes the connection, unless the cable is out."""
        if self.other and self.world.paths[self.node, self.peer].up:
            self.world.loop.post(self.other.process, 0.0005, self.other.closed_by_peer)

    def closed_by_peer(self) -> None:
        if not self._closed:
            self._closed = True
            if self.protocol is not None:
                self.protocol.connection_lost(None)


class Wire:
    """A gateway's network."""

    def __init__(self, world: "World", node: str, peer: str, process: Process) -> None:
        self.world, self.node, self.peer, self.process = world, node, peer, process
        self.accepted: Callable[[], asyncio.BaseProtocol] | None = None
        self.ends: list[End] = []

    name, expects = "wire", ""

    async def listen(self, accepted: Callable[[], asyncio.BaseProtocol]) -> None:
        self.accepted = accepted

    async def connect(self, connected: Callable[[], asyncio.BaseProtocol]) -> None:
        await asyncio.sleep(0.001)
        other: Any = self.world.nodes[self.peer].gateway
        paths = self.world.paths
        up = paths[self.node, self.peer].up and paths[self.peer, self.node].up
        if not up or other is None or other.process.dead or other.wire.accepted is None:
            raise OSError(errno.ECONNREFUSED, "no answer")
        here, there = End(self.world, self.node, self.peer, self.process), None
        there = End(self.world, self.peer, self.node, other.process)
        here.other, there.other = there, here
        self.ends.append(here)
        other.wire.ends.append(there)
        here.protocol = connected()
        self.world.loop.post(other.process, 0.0002, self._accept, there, other.wire.accepted)
        here.protocol.connection_made(here)

    def _accept(self, end: End, accepted: Callable[[], asyncio.BaseProtocol]) -> None:
        if end.is_closing():
            return
        end.protocol = accepted()
        end.protocol.connection_made(end)

    def close(self) -> None:
        pass

    def died(self) -> None:
        """The process is gone; its kernel, if there is one, ends its connections."""
        for end in self.ends:
            end.tell_other()
