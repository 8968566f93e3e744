"""The gateway's end for the process that serves the share: takes its changes into the log, one writer at a time."""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Final

import msgspec
import structlog

from storage.engine import Engine
from storage.files.namespace import Proposal
from storage.files.wire import Begin, Begun, Committed, Ended, Message, Propose, frame, next_message
from storage.ingest import NotServing

log = structlog.get_logger()

UNANSWERED_MAX: Final = 4096  # changes on their way; more wait in the socket
NOT_MIRRORED: Final = "the bytes of the share's files aren't mirrored yet: it is for a node that runs alone"


class FilesServer:
    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine, self._path = engine, path
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._busy = False

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        os.chmod(self._path, 0o600)

    async def stop(self) -> None:
        if self._server:
            self._server.close()
        for writer in list(self._writers):
            writer.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if isinstance(await next_message(reader), Begin):
                await self._serve_one(reader, writer)
        except (EOFError, ConnectionError, ValueError, msgspec.DecodeError):
            pass  # it is gone, or speaks another language
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine = self._engine
        why = NOT_MIRRORED if engine.settings.cluster else "another process serves the share" if self._busy else ""
        if why:
            await _say(writer, Ended(why))
            return
        self._busy = True
        proposals: asyncio.Queue[Proposal] = asyncio.Queue(UNANSWERED_MAX)
        try:
            await engine.settle_files()
            engine.catalogue.kv.forget_readers()
            await _say(writer, self._begun())
            log.info("share.begun")
            async with asyncio.TaskGroup() as group:
                answering = group.create_task(_answer(proposals, writer))
                try:
                    while isinstance(message := await next_message(reader), Propose):
                        await proposals.put(engine.propose_files(message.change))
                finally:
                    answering.cancel()
        except* NotServing as refused:
            with contextlib.suppress(ConnectionError):
                await _say(writer, Ended(str(refused.exceptions[0])))
        except* (EOFError, ConnectionError):
            pass  # it is gone
        except* (ValueError, msgspec.DecodeError):
            with contextlib.suppress(ConnectionError):
                await _say(writer, Ended("it isn't understood: it is of another version"))
        finally:
            engine.catalogue.kv.forget_readers()  # it may have been killed in the middle of reading
            self._busy = False
            log.info("share.ended")

    def _begun(self) -> Begun:
        engine, storage = self._engine, self._engine.settings.storage
        slots = engine.volumes.slots
        return Begun(
            str(storage.state / "catalogue"),
            tuple(str(slot.path) for slot in slots),
            tuple(str(slot.path) for slot in slots if slot.volume is None or slot.volume.draining),
            storage.reserve_bytes,
            engine.state_reserve_bytes,
            str(storage.log_folder),
        )


async def _answer(proposals: "asyncio.Queue[Proposal]", writer: asyncio.StreamWriter) -> None:
    """In the order in which they were proposed, which is that in which they are committed."""
    count = 0
    while True:
        proposal = await proposals.get()
        await proposal.committed()
        count += 1
        if proposals.empty() or count % UNANSWERED_MAX == 0:
            await _say(writer, Committed(count, proposal.seq))


async def _say(writer: asyncio.StreamWriter, message: Message) -> None:
    writer.write(frame(message))
    await writer.drain()
