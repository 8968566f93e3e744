"""The log as the process that serves the share has it: on the other end of a socket."""

import asyncio
import errno
from collections import deque
from pathlib import Path
from typing import Final

import msgspec

from storage.files.wire import Begin, Begun, Committed, Ended, Propose, frame, next_message
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


class RemoteLog:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._waiting: deque[RemoteProposal] = deque()
        self._committed = 0
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # why

    @classmethod
    async def begin(cls, path: Path) -> "tuple[RemoteLog, Begun]":
        """Raises OSError with one line."""
        try:
            reader, writer = await asyncio.open_unix_connection(path)
        except OSError as error:
            raise OSError(error.errno, f"no gateway answers at {path}: {error.strerror}") from error
        writer.write(frame(Begin()))
        try:
            message = await next_message(reader)
        except (EOFError, ValueError, msgspec.DecodeError) as error:
            raise OSError(errno.ECONNRESET, "the gateway ended before it answered") from error
        if isinstance(message, Ended):
            raise OSError(errno.EPERM, message.why)
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
                elif isinstance(message, Ended):
                    why = message.why
                    return
        except (EOFError, OSError, ValueError, msgspec.DecodeError):
            return
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
        for proposal in self._waiting:
            proposal.answer.set_exception(OSError(errno.EIO, why))
        self._waiting.clear()
