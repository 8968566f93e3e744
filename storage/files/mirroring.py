"""The second copy of each file of the share, as the node that is written to keeps it: told of every change, made
durable with this node's, brought up to date block by block after it was away, read where this node's own is lost."""

from collections.abc import Awaitable, Callable
from typing import Any

import xxhash

from storage.files.copies import StoredFile, digest_of, new_generation
from storage.files.opened import OpenFile
from storage.files.peer import (
    Answer,
    Begin,
    Blocks,
    Compare,
    Create,
    Cut,
    End,
    Failed,
    Fetch,
    Fetched,
    Pair,
    Peer,
    PeerLost,
    Renew,
    Renewed,
    Sync,
    Synced,
    Write,
)
from storage.objects.blocks import BLOCK_BYTES
from storage.state import file_rows
from storage.state.file_model import Held
from storage.state.kv import KeyValues

OnDisk = Callable[..., Awaitable[Any]]
Look = Callable[[Callable[[KeyValues], Any]], Any]


class PeerCannot(Exception):
    """The other node's copy can't be had, or not be written to."""


class Mirroring:
    def __init__(
        self,
        pair: Pair,
        peer: Peer,
        on_disk: OnDisk,
        look: Look,
        hold: Callable[[Held], object],
        space: Callable[[], str],
    ) -> None:
        """`on_disk(function, *args)` works in a thread; `look` reads the rows of the share; `hold` puts this in the
        log."""
        self.pair, self.peer, self._on_disk = pair, peer, on_disk
        self._look, self._hold, self._space = look, hold, space

    def lacking(self, number: int) -> tuple[str, ...]:
        found: tuple[str, ...] = self._look(lambda rows: file_rows.lacking(rows, number))
        return found

    def generation(self, number: int, node: str) -> str:
        found: str = self._look(lambda rows: file_rows.generation(rows, number, node))
        return found

    # -- told at once ----------------------------------------------------------------------------------------------

    def made(self, file: OpenFile) -> None:
        """It has just been made here, and is empty."""
        if session := self.peer.state.session:
            self.peer.tell(session, Create(self._space(), file.number))
            file.told = file.alike = session
            file.peer_copy = ""

    def begin(self, file: OpenFile) -> None:
        """It is about to be changed, and both copies are the same: it is clean. While it is brought to the other node,
        that hears of the change anyway."""
        session = self.peer.state.session
        may = not (self.is_alike(file) or file.bringing.locked())
        if session and may and self.pair.peer not in self.lacking(file.number):
            file.peer_copy = self.generation(file.number, self.pair.peer)
            self.peer.tell(session, Begin(self._space(), file.number, file.peer_copy, file.size))
            file.told = file.alike = session

    def tells(self, file: OpenFile) -> bool:
        """Each change of it reaches the other node."""
        return file.told != 0 and file.told == self.peer.state.session

    def is_alike(self, file: OpenFile) -> bool:
        return file.alike != 0 and file.alike == self.peer.state.session

    def wrote(self, file: OpenFile, at: int, data: bytes) -> None:
        if self.tells(file):
            self.peer.tell(file.told, Write(file.number, at, data))

    def truncated(self, file: OpenFile, size: int) -> None:
        if self.tells(file):
            self.peer.tell(file.told, Cut(file.number, size))

    def differs(self, file: OpenFile) -> None:
        """The other copy isn't what this one is any more."""
        file.told = file.alike = 0

    def end(self, file: OpenFile) -> None:
        if self.tells(file):
            self.peer.tell(file.told, End(file.number))
        self.differs(file)

    # -- durable ---------------------------------------------------------------------------------------------------

    async def sync(self, file: OpenFile) -> tuple[str, ...]:
        """Make the other copy the same, and durable. Returns the other node if it lacks it: because it isn't in sync,
        lacks it already, or can't keep it. While it is in sync and isn't there, this waits. Raises OSError."""
        other = (self.pair.peer,)
        while True:
            state = self.peer.state
            try:
                if self.is_alike(file):
                    return () if await self.synced(file) else other
                if not state.required or self.pair.peer in self.lacking(file.number) or file.lost:
                    return other
                if state.session:
                    await self.bring(file)
                    continue
            except PeerCannot:
                return other
            except PeerLost:
                pass
            await self.peer.changed(state)

    async def synced(self, file: OpenFile) -> bool:
        """All that was told is durable there. To be called in the file's turn, when the copies are alike. Raises
        PeerLost."""
        if not isinstance(await self.peer.ask(file.alike, Sync(file.number)), Synced):
            self.differs(file)
            return False
        if file.peer_copy != self.generation(file.number, self.pair.peer):
            self._hold(Held(file.number, self.pair.peer, file.peer_copy))
        return True

    # -- block by block --------------------------------------------------------------------------------------------

    async def bring(self, file: OpenFile) -> None:
        """Make the other copy the same as this node's, which is open. Raises PeerLost, PeerCannot, OSError."""
        async with file.bringing:
            session = self.peer.state.session
            if self.is_alike(file):
                return
            if file.lost:
                raise PeerCannot("this node's copy is lost")
            async with file.order:
                size, local = file.size, file.local
                copy = self.generation(file.number, self.pair.peer)
                spare = new_generation()
                answer = await self.peer.ask(session, Renew(self._space(), file.number, copy, spare, size))
                if not isinstance(answer, Renewed):
                    raise PeerCannot(why(answer))
                file.told, file.peer_copy = session, answer.copy
            try:
                if local is not None:
                    await self._bring_blocks(file, local, session, size)
            except BaseException:
                self.differs(file)
                raise
            if file.told == session:  # else something has failed meanwhile
                file.alike = session

    async def _bring_blocks(self, file: OpenFile, local: StoredFile, session: int, size: int) -> None:
        count, theirs = -(-size // BLOCK_BYTES), list[bytes]()
        for number in range(count):
            digest = await self._digest_of_theirs(session, file.number, file.peer_copy, theirs, number)
            if await self._on_disk(digest_of, local, number) == digest:
                continue
            async with file.order:
                at = number * BLOCK_BYTES
                data = await self._on_disk(local.read, min(BLOCK_BYTES, max(0, file.size - at)), at)
                if data and self.tells(file):
                    self.peer.tell(session, Write(file.number, at, data))
            await self.peer.room()

    async def compared(self, session: int, compare: Compare) -> Blocks:
        """Raises PeerLost, PeerCannot."""
        answer = await self.peer.ask(session, compare)
        if not isinstance(answer, Blocks):
            raise PeerCannot(why(answer))
        return answer

    async def pull(self, file: OpenFile, local: StoredFile, size: int | None) -> int:
        """Make a copy of this node the same as the other one's, and durable; `size`: its length, None: as it is there.
        Nothing may change either meanwhile. Returns the length. Raises PeerLost, PeerCannot, OSError."""
        session, number = self.peer.state.session, file.number
        copy = self._other_copy(file)
        first = await self.compared(session, Compare(self._space(), number, copy, 0))
        if size is not None and first.size < size:
            raise PeerCannot("the other copy is too short")
        size = first.size if size is None else size
        theirs = list(first.digests)
        for block in range(-(-size // BLOCK_BYTES)):
            digest = await self._digest_of_theirs(session, number, copy, theirs, block)
            if not digest:
                raise PeerCannot("the other copy is too short")
            if await self._on_disk(digest_of, local, block) != digest:
                data = await self.fetched(session, Fetch(self._space(), number, copy, block * BLOCK_BYTES, BLOCK_BYTES))
                if xxhash.xxh3_128_digest(data) != digest:
                    raise PeerCannot("the other copy is being changed")
                await self._on_disk(local.write, data, block * BLOCK_BYTES, len(data))
        await self._on_disk(local.truncate, size)
        await self._on_disk(local.sync)
        return size

    async def fetched(self, session: int, fetch: Fetch) -> bytes:
        """Raises PeerLost, PeerCannot."""
        answer = await self.peer.ask(session, fetch)
        if not isinstance(answer, Fetched):
            raise PeerCannot(why(answer))
        return answer.data

    async def read(self, file: OpenFile, at: int, size: int) -> bytes:
        """From the other copy. Raises PeerLost, PeerCannot."""
        copy = self._other_copy(file)
        return await self.fetched(self.peer.state.session, Fetch(self._space(), file.number, copy, at, size))

    async def differing(self, file: OpenFile, local: StoredFile, size: int) -> list[int]:
        """The blocks in which a copy of this node and the other one's aren't the same. Raises PeerLost, PeerCannot,
        OSError."""
        session, copy, found, theirs = self.peer.state.session, self._other_copy(file), list[int](), list[bytes]()
        for block in range(-(-size // BLOCK_BYTES)):
            digest = await self._digest_of_theirs(session, file.number, copy, theirs, block)
            if not digest or await self._on_disk(digest_of, local, block) != digest:
                found.append(block)
        return found

    async def _digest_of_theirs(self, session: int, number: int, copy: str, theirs: list[bytes], block: int) -> bytes:
        """Of a block of the other node's copy, b"" behind its end; `theirs`: those of the blocks before it, and of some
        more perhaps, to which others are added. Raises PeerLost, PeerCannot."""
        if block >= len(theirs):
            theirs += (await self.compared(session, Compare(self._space(), number, copy, block))).digests
        theirs += [b""] * (block + 1 - len(theirs))
        return theirs[block]

    def _other_copy(self, file: OpenFile) -> str:
        """What is being brought to it isn't one before it is whole."""
        return file.peer_copy if self.is_alike(file) else self.generation(file.number, self.pair.peer)


def why(answer: Answer) -> str:
    return answer.why if isinstance(answer, Failed) else "an answer that wasn't asked for"
