"""Log and other node as the process that serves the share has them: on the other end of a socket."""

import asyncio
import contextlib
import errno
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from storage.files.peer import Answer, AskedFor, Asking, PeerState, Told, decode_answer, encode
from storage.files.wire import (
    Ask,
    Begin,
    Begun,
    Committed,
    Ended,
    Move,
    PeerIs,
    Propose,
    Said,
    Tell,
    VolumesAre,
    frame,
    next_message,
)
from storage.state.file_model import Change

WAITING_MAX: Final = 1 << 16  # far less than `storage.state.files.NUMBERS_SKIPPED`


class RemoteProposal:
    """A change on its way; `seq` becomes a number that is not below its own in the log."""

    def __init__(self) -> None:
        self.seq = 0
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may wait

    async def committed(self) -> None:
        """Raises OSError (EIO); then it isn't known whether it is, or will be."""
        await asyncio.shield(self.answer)


class NoGateway(OSError):
    """None answers, with one line."""


class RemotePeer:
    """See `Peer`."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._asking = Asking(PeerState(0, required=True))  # until the gateway has said what it is
        self._ended = False

    @property
    def state(self) -> PeerState:
        return self._asking.state

    def tell(self, session: int, op: Told) -> None:
        self._writer.write(frame(Tell(session, msgspec.Raw(encode(op)))))

    async def room(self) -> None:
        with contextlib.suppress(ConnectionError):  # who waits for an answer hears of it
            await self._writer.drain()

    async def ask(self, session: int, op: AskedFor) -> Answer:
        def send(token: int) -> bool:
            if not session or session != self.state.session:
                return False
            self._writer.write(frame(Ask(token, session, msgspec.Raw(encode(op)))))
            return True

        return decode_answer(await self._asking.ask(send))

    async def changed(self, before: PeerState) -> None:
        """Raises OSError (EIO) when there is no gateway any more that would tell."""
        while self.state == before:
            if self._ended:
                raise OSError(errno.EIO, "the gateway is gone")
            await self._asking.change()

    def end(self) -> None:
        """Nothing that is flushed is known to be on both nodes any more."""
        self._ended = True
        self.is_now(PeerState(0, required=True))

    def is_now(self, state: PeerState) -> None:
        self._asking.is_now(state)

    def said(self, message: Said) -> None:
        """An answer that comes with the end of its session: the new state is on its way."""
        if message.answer:
            self._asking.answered(message.token, message.answer)


class RemoteLog:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._waiting: deque[RemoteProposal] = deque()
        self._committed = 0
        self.peer = RemotePeer(writer)
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # why
        self.on_volumes: Callable[[VolumesAre], object] = lambda volumes: None
        self.on_move: Callable[[Move], object] = lambda move: None

    @classmethod
    async def begin(cls, path: Path) -> "tuple[RemoteLog, Begun]":
        """Raises NoGateway, OSError with one line."""
        try:
            reader, writer = await asyncio.open_unix_connection(path)
        except OSError as error:
            raise NoGateway(error.errno, f"no gateway answers at {path}: {error.strerror}") from error
        writer.write(frame(Begin()))
        try:
            message = await next_message(reader)
        except (EOFError, ValueError, msgspec.DecodeError) as error:
            raise NoGateway(errno.ECONNRESET, "the gateway ended before it answered") from error
        if isinstance(message, Ended):
            raise NoGateway(errno.EPERM, message.why)
        if not isinstance(message, Begun):
            raise OSError(errno.EPROTO, "the gateway speaks another language: it is of another version")
        return cls(reader, writer), message

    def propose(self, change: Change) -> RemoteProposal:
        """Raises OSError (EIO) when nothing is taken any more."""
        if self.ended.done():
            raise OSError(errno.EIO, self.ended.result())
        if len(self._waiting) >= WAITING_MAX:
            raise OSError(errno.EAGAIN, "too many changes are on their way")
        proposal = RemoteProposal()
        self._waiting.append(proposal)
        self._writer.write(frame(Propose(change)))
        return proposal

    async def run(self) -> None:
        """Until the gateway ends it, for whatever reason."""
        why = "the gateway is gone"
        try:
            while True:
                message = await next_message(self._reader)
                if isinstance(message, Committed):
                    self._note(message)
                elif isinstance(message, PeerIs):
                    self.peer.is_now(message.state)
                elif isinstance(message, Said):
                    self.peer.said(message)
                elif isinstance(message, VolumesAre):
                    self.on_volumes(message)
                elif isinstance(message, Move):
                    self.on_move(message)
                elif isinstance(message, Ended):
                    why = message.why
                    return
        except (EOFError, OSError):
            return
        except (ValueError, msgspec.DecodeError):
            why = "the gateway says what isn't understood: it is of another version"
        finally:
            self._end(why)

    def _note(self, message: Committed) -> None:
        while self._committed < message.count:
            self._committed += 1
            proposal = self._waiting.popleft()
            proposal.seq = message.seq
            proposal.answer.set_result(None)

    def _end(self, why: str) -> None:
        self.ended.set_result(why)
        self._writer.close()
        self.peer.end()
        for proposal in self._waiting:
            proposal.answer.set_exception(OSError(errno.EIO, why))
        self._waiting.clear()
