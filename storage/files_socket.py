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
from storage.files.peer import PeerLost
from storage.files.wire import (
    Ask,
    Begin,
    Begun,
    Committed,
    Ended,
    Message,
    Move,
    PeerIs,
    Propose,
    Said,
    Tell,
    VolumesAre,
    frame,
    next_message,
)
from storage.ingest import NotServing
from storage.state.kv import DATA_FILE

log = structlog.get_logger()

LOOK_S: Final = 0.2  # between two looks whether this node leads by now
IS_PRIMARY: Final = "this node is the primary now"
OTHER_CATALOGUE: Final = "this node has taken the other one's state"
UNANSWERED_MAX: Final = 4096  # changes on their way; more wait in the socket


class FilesServer:
    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine, self._path = engine, path
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._busy = False
        self._leaving: dict[str, dict[int, None]] = {}  # node -> inode numbers
        engine.mirror.on_move = self._move

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
        try:
            if self._engine.may_serve:
                await self._serve_writer(reader, writer)
            else:
                await self._serve_reader(reader, writer)
        except* NotServing as refused:
            with contextlib.suppress(ConnectionError):
                await _say(writer, Ended(_first(refused)))
        except* (EOFError, ConnectionError):
            pass  # it is gone
        except* (ValueError, msgspec.DecodeError):
            with contextlib.suppress(ConnectionError):
                await _say(writer, Ended("it isn't understood: it is of another version"))
        finally:
            self._engine.catalogue.kv.forget_readers()  # it may have been killed in the middle of reading

    async def _serve_writer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine = self._engine
        if self._busy:
            await _say(writer, Ended("another process serves the share"))
            return
        self._busy = True
        proposals: asyncio.Queue[Proposal] = asyncio.Queue(UNANSWERED_MAX)
        try:
            await engine.settle_files()
            engine.catalogue.kv.forget_readers()
            self._leaving, known = {}, engine.known_of_volumes()
            await _say(writer, self._begun(writes=True))
            log.info("share.begun")
            async with asyncio.TaskGroup() as group:
                helpers = [
                    group.create_task(_answer(proposals, writer)),
                    group.create_task(self._tell_of_peer(writer)),
                    group.create_task(self._tell_of_volumes(writer, known)),
                    group.create_task(self._while_serving()),
                ]
                try:
                    while True:
                        await self._take(await next_message(reader), proposals, writer, group)
                finally:
                    for helper in helpers:
                        helper.cancel()
        finally:
            self._busy = False
            log.info("share.ended")

    async def _take(
        self,
        message: Message,
        proposals: "asyncio.Queue[Proposal]",
        writer: asyncio.StreamWriter,
        group: asyncio.TaskGroup,
    ) -> None:
        mirror = self._engine.mirror
        match message:
            case Propose(change):
                await proposals.put(self._engine.propose_files(change))
            case Tell(session, op):
                mirror.tell_raw(session, op)
                await mirror.room()
            case Ask(token, session, op):
                group.create_task(self._ask(token, session, op, writer))
            case _:
                raise ValueError("not for us")

    async def _ask(self, token: int, session: int, op: msgspec.Raw, writer: asyncio.StreamWriter) -> None:
        answer = b""
        with contextlib.suppress(PeerLost):
            answer = await self._engine.mirror.ask_raw(session, op)
        await _say(writer, Said(token, answer))

    async def _tell_of_peer(self, writer: asyncio.StreamWriter) -> None:
        """Whenever it has changed."""
        mirror = self._engine.mirror
        while True:
            state = mirror.state
            await _say(writer, PeerIs(state))
            await mirror.changed(state)

    async def _tell_of_volumes(self, writer: asyncio.StreamWriter, known: object) -> None:
        """Whenever what is `known` of them has changed since `Begun`, and what is to leave them."""
        while True:
            await asyncio.sleep(LOOK_S)
            known = await self._say_volumes(writer, known)
            leaving, self._leaving = self._leaving, {}
            for node, numbers in leaving.items():
                await _say(writer, Move(node, tuple(numbers)))

    async def _say_volumes(self, writer: asyncio.StreamWriter, known: object) -> object:
        """If what is known of them is another. Returns that."""
        now = self._engine.known_of_volumes()
        if now != known:
            begun = self._begun(writes=False)
            absent = tuple(str(slot.path) for slot in self._engine.volumes.slots if not slot.usable)
            await _say(writer, VolumesAre(begun.volumes, begun.draining, absent, begun.complete))
        return now

    def _move(self, node: str, numbers: list[int]) -> bool:
        """Have the share's writer move copies off their volumes. Returns whether there is one."""
        if self._busy:
            self._leaving.setdefault(node, {}).update(dict.fromkeys(numbers))
        return self._busy

    async def _while_serving(self) -> None:
        """Raises NotServing when this node isn't the primary any more, or may not act as it."""
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._engine.may_serve:
                raise NotServing("another node has taken over, or may have")

    async def _serve_reader(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until this node leads, or has another catalogue."""
        engine = self._engine
        database = engine.settings.storage.state / "catalogue" / DATA_FILE
        opened = database.stat().st_ino
        known = engine.known_of_volumes()
        await _say(writer, self._begun(writes=False))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            while not gone.done() and not engine.may_serve and database.stat().st_ino == opened:
                await asyncio.wait((gone,), timeout=LOOK_S)
                known = await self._say_volumes(writer, known)
        finally:
            gone.cancel()
        if not gone.done() or gone.cancelled():
            await _say(writer, Ended(IS_PRIMARY if engine.may_serve else OTHER_CATALOGUE))

    def _begun(self, *, writes: bool) -> Begun:
        engine, storage, cluster = self._engine, self._engine.settings.storage, self._engine.settings.cluster
        volumes, draining = engine.share_volumes()
        return Begun(
            str(storage.state / "catalogue"),
            tuple(str(path) for path in volumes),
            tuple(str(path) for path in draining),
            storage.reserve_bytes,
            engine.state_reserve_bytes,
            str(storage.log_folder),
            engine.settings.node.name,
            cluster.peer if cluster else "",
            writes,
            len(volumes) == len(engine.volumes.slots),
        )


def _first(group: BaseExceptionGroup[NotServing]) -> str:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return str(found)


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
