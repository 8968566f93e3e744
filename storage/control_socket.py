"""The gateway's end of the control socket: takes `Tell`, gives `Report`, answers `status`, carries out orders."""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Final

import msgspec
import structlog

from storage.control import (
    LINE_BYTES_MAX,
    Answer,
    Clients,
    Order,
    Progress,
    StatusReply,
    StatusRequest,
    Tell,
    decode_line,
    encode_line,
)
from storage.engine import Engine
from storage.ingest import NotServing
from storage.objects.volume import NoRoom
from storage.orders import Refused, Service
from storage.status import node_status

log = structlog.get_logger()

REPORT_DELAY_S: Final = 0.02


class ControlServer:
    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine, self._path = engine, path
        self._service = Service(engine)
        self._agents: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._scheduled = False
        engine.on_change = self._changed
        engine.peering.on_clients = self._pass_on

    async def start(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path, limit=LINE_BYTES_MAX)
        os.chmod(self._path, 0o600)

    async def stop(self) -> None:
        if self._server:
            self._server.close()
        for writer in list(self._agents):
            writer.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _changed(self) -> None:
        """Report soon; many changes make one report."""
        if self._agents and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_later(REPORT_DELAY_S, self._report)

    def _report(self) -> None:
        self._scheduled = False
        line = encode_line(self._engine.report())
        for writer in self._agents:
            writer.write(line)

    def _pass_on(self, encoded: bytes) -> None:
        """What the other node's agent has to say to ours."""
        for writer in self._agents:
            writer.write(encoded + b"\n")

    async def _carry_out(self, order: Order, writer: asyncio.StreamWriter) -> None:
        def progress(done: int, of: int) -> None:
            writer.write(encode_line(Progress(done, of)))

        try:
            answer = Answer(await self._service.carry_out(order.name, order.given, progress))
        except Refused as error:
            answer = Answer(error=str(error))
        except (OSError, ValueError, NotServing, NoRoom) as error:
            answer = Answer(error=str(error) or type(error).__name__)
        writer.write(encode_line(answer))
        await writer.drain()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                message = decode_line(line)
                if isinstance(message, Tell):
                    if writer not in self._agents:
                        self._agents.add(writer)
                    if message.role != "hello":
                        self._engine.tell(message)
                    self._report()
                elif isinstance(message, Clients):
                    self._engine.peering.send_clients(line.rstrip(b"\n"))
                elif isinstance(message, StatusRequest):
                    await self._engine.settled()
                    writer.write(encode_line(StatusReply(node_status(self._engine))))
                elif isinstance(message, Order):
                    await self._carry_out(message, writer)
        except (msgspec.DecodeError, ConnectionError, ValueError) as error:
            log.warning("control.bad_line", error=str(error))
        finally:
            self._agents.discard(writer)
            writer.close()
