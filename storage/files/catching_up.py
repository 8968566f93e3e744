"""What the node whose share is written to does about copies that aren't what they should be: files that were left dirty
are made the same on both nodes and clean, what the other node lacks is brought to it, what this one lacks is had from
there. Block by block: only what differs goes over the wire. And what is to leave a volume is moved off it."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from itertools import islice
from typing import Final

import structlog

from conf.telling import reason_of
from storage.files.mirroring import PeerCannot
from storage.files.peer import PeerLost, PeerState
from storage.files.share import Share
from storage.state import file_rows
from storage.state.kv import KeyValues

log = structlog.get_logger()

AGAIN_S: Final = 5.0
MOVED_AGAIN_S: Final = 10.0
LOOK_S: Final = 0.2  # between two looks for what is to be moved
LATER_S: Final = 300.0  # what fails again and again is tried so seldom
AT_ONCE: Final = 500  # rows looked at


class CatchingUp:
    def __init__(self, share: Share) -> None:
        self._share = share
        self._later: dict[int, tuple[float, float]] = {}  # what failed: when it is tried again, how long after the last
        self._moving: dict[tuple[int, str], None] = {}  # (inode number, node)
        self._not_moved: dict[tuple[int, str], float] = {}  # when that is tried again

    def move(self, node: str, numbers: Iterable[int]) -> None:
        """Copies of a node are to leave volumes on which nothing is put any more. Who asks looks what came of it."""
        now = asyncio.get_running_loop().time()
        asked = [(number, node) for number in numbers]
        self._moving |= dict.fromkeys(one for one in asked if self._not_moved.get(one, now) <= now)

    async def run(self) -> None:
        """As long as there is somebody to log what changes."""
        moving, others = (asyncio.create_task(work()) for work in (self._move_on, self._catch_up))
        try:
            await others
        finally:
            moving.cancel()
            await asyncio.wait((moving,))

    async def _catch_up(self) -> None:
        mirroring = self._share.mirroring
        if mirroring is None:
            await asyncio.Event().wait()
            return
        while True:
            state = mirroring.peer.state
            with contextlib.suppress(PeerLost):
                await self.once(state)
            try:
                async with asyncio.timeout(AGAIN_S):
                    await mirroring.peer.changed(state)
            except TimeoutError:
                continue
            except OSError:
                return

    async def _move_on(self) -> None:
        while True:
            await self.move_asked()
            await asyncio.sleep(LOOK_S)

    async def move_asked(self) -> None:
        """What was asked for until now."""
        while self._moving:
            number, node = next(iter(self._moving))
            try:
                await self._share.move(number, node)
                self._not_moved.pop((number, node), None)
            except (OSError, PeerCannot, PeerLost) as error:
                self._not_moved[number, node] = asyncio.get_running_loop().time() + MOVED_AGAIN_S
                log.warning("share.not_moved", inode=number, node=node, error=_why(error))
            finally:
                self._moving.pop((number, node), None)

    async def once(self, state: PeerState) -> None:
        """One round. Raises PeerLost."""
        for number in self._share.look(file_rows.dirty):
            await self._try(self._share.settle, number)
        if not state.session:
            return
        after = 0
        while found := self._lacking_behind(after):
            for number, node in found:
                is_own = node == self._share.node
                await self._try(self._share.heal_own if is_own else self._share.heal_other, number)
            after = found[-1][0]

    def _lacking_behind(self, after: int) -> list[tuple[int, str]]:
        """Whole files: a page doesn't end between two nodes of one."""

        def page(rows: KeyValues) -> list[tuple[int, str]]:
            found = list(islice(file_rows.all_lacking(rows, after), AT_ONCE))
            return found + [(found[-1][0], node) for node in file_rows.lacking(rows, found[-1][0])] if found else []

        return list(dict.fromkeys(self._share.look(page)))

    async def _try(self, what: Callable[[int], Awaitable[None]], number: int) -> None:
        """One that can't be caught up now isn't in the way of the others."""
        now = asyncio.get_running_loop().time()
        at, wait_s = self._later.get(number, (now, AGAIN_S))
        if now < at:
            return
        try:
            await what(number)
            self._later.pop(number, None)
        except (OSError, PeerCannot) as error:
            if number not in self._later:
                log.warning("share.not_caught_up", inode=number, error=reason_of(error))
            self._later[number] = now + wait_s, min(2 * wait_s, LATER_S)


def _why(error: Exception) -> str:
    return reason_of(error) if isinstance(error, OSError) else str(error) or "the other node isn't there"
