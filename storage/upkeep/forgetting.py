"""Has both nodes forget what they both know to be over: the entries of deletions, of tasks and of their ends.

Until then a node that was away has to hear of them. Afterwards one whose log ends before that point, an older image of
its disk or an empty one, takes the state instead of the log, in which they are missing (`Replica.forget`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from storage.replication.duty import Duty
from storage.replication.messages import TAKES_STATE
from storage.replication.replica import Replica
from storage.state.catalogue import Catalogue
from storage.state.model import Forget
from storage.workers import Threads

FORGET_S: Final = 600.0  # how long something is kept at least, and at most twice that while the pair is in sync


class Forgetting:
    def __init__(
        self,
        core: Replica,
        duty: Duty,
        catalogue: Catalogue,
        workers: Threads,
        *,
        applied: Callable[[], int],
        commit: Callable[[Forget], Awaitable[None]],
    ) -> None:
        """`applied()`: up to where this node's log is applied; `commit(forget)` may fail, it is tried again later."""
        self._core, self._duty, self._catalogue, self._workers = core, duty, catalogue, workers
        self._applied, self._commit = applied, commit
        self._upto = 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(FORGET_S)
            before, self._upto = self._upto, self._known_to_both()
            upto = min(before, self._upto)
            if not upto or not await self._workers.run(self._catalogue.forgettable, upto):
                continue
            await self._commit(Forget(upto))

    def _known_to_both(self) -> int:
        """Up to which entry both nodes have the log now, durably; 0 if that can't be said."""
        core = self._core
        if not self._duty.may_serve:
            return 0
        if core.peer is None:
            return self._applied()
        hello = core.peer_hello
        both = core.in_sync.confirmed == core.in_sync.required == {core.node, core.peer} and core.joined
        return min(self._applied(), core.peer_acked) if both and hello and hello.features >= TAKES_STATE else 0
