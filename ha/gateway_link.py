"""The agent's end of the control socket to the gateway of this node."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import structlog

from storage.control import LINE_BYTES_MAX, NEVER, Clients, Line, Report, Tell, boottime, decode_line, encode_line

log = structlog.get_logger()

CONNECT_INTERVAL_S: Final = 0.1
STALE_S: Final = 4.0  # a gateway that says nothing this long hangs; longer than this machine's pauses


class SocketGatewayLink:
    def __init__(self, path: Path, wake: asyncio.Event) -> None:
        self._path, self._wake = path, wake
        self._last: Report | None = None
        self._last_at = 0.0
        self._writer: asyncio.StreamWriter | None = None
        self.on_clients: Callable[[Clients], None] = lambda _: None  # those of the other node
        self._draining = False
        self._process = (0, "")  # (pid, when it was started) of the gateway that reported last

    @property
    def dead(self) -> bool:
        """The process that reported last has ended: not stopped, not hanging, not only silent."""
        pid, started = self._process
        return self._last is None and pid != 0 and _start_of(pid) != started

    @property
    def report(self) -> Report | None:
        if self._last is not None and boottime() - self._last_at > STALE_S:
            return None
        return self._last

    async def tell(self, tell: Tell) -> None:
        self._draining = tell.drain
        self.send(tell)

    def send(self, line: Line) -> None:
        """Lost while the gateway is away."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_line(line))

    async def run(self) -> None:
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._path, limit=LINE_BYTES_MAX)
                await self.tell(Tell("hello"))
                await self._listen(reader)
            except OSError:
                pass
            except (msgspec.DecodeError, ValueError) as error:
                log.error("gateway.bad_report", error=str(error))
            if self._last is not None:
                log.warning("gateway.away")
            self._last, self._writer = None, None
            self._wake.set()
            await asyncio.sleep(CONNECT_INTERVAL_S)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = decode_line(line)
            if isinstance(message, Clients):
                self.on_clients(message)
            elif isinstance(message, Report):
                if message.pid != self._process[0]:
                    self._process = (message.pid, _start_of(message.pid))
                changed = self._last is None or _important(self._last) != _important(message)
                drained = self._draining and not message.busy and message.last == message.peer_last
                self._last, self._last_at = message, boottime()
                if changed or drained:
                    self._wake.set()


def _important(report: Report) -> tuple[object, ...]:
    """What calls for a decision at once; the rest waits for the next round."""
    lease = (report.withhold, report.granted_until > NEVER)
    return (report.incarnation, report.promised, report.leading, report.serving, report.linked, report.asked, lease)


def _start_of(pid: int) -> str:
    """When a process was started, in ticks since boot; "" if there is none, or nothing of it but its exit status. The
    start tells a process from a later one with the same number (proc(5), /proc/pid/stat)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
