"""Takes the role that the HA agent tells and drives the replication core through it.

Leading takes steps that wait: nothing may be in flight, promises to the old primary must have run out, and the new
epoch must be on disk before anything is done in its name.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable

from storage.control import NEVER, Asked, Member, Report, Tell
from storage.replication.in_sync import Ask
from storage.replication.messages import FEATURES
from storage.replication.replica import Replica

POLL_S = 0.02


class Duty:
    def __init__(
        self,
        core: Replica,
        *,
        clock: Callable[[], float],
        persist_promise: Callable[[int], Awaitable[None]],
        abandon: Callable[[], None],
        flush: Callable[[], None],
        fit: Callable[[], bool] = lambda: True,
        standby_reads: bool = True,
        isolated_reads: bool = False,
    ) -> None:
        """`fit`: this node has a disk to keep things on. Readers are answered while it follows (`standby_reads`), and
        while it hears nobody (`isolated_reads`)."""
        self._core, self._clock = core, clock
        self._persist_promise, self._abandon, self._flush = persist_promise, abandon, flush
        self._fit, self._standby_reads, self._isolated_reads = fit, standby_reads, isolated_reads
        self._etcd_ok = True
        self.note_lineage: Callable[[str], None] = lambda _: None  # durably, some time soon
        self._told = 0
        self._task: asyncio.Task[None] | None = None
        self.serve_until = NEVER
        self._begun: tuple[int, int] | None = None  # epoch, and how far it was committed when serving began
        self._answered_at = NEVER
        self.busy: Callable[[], int] = lambda: 0  # requests of clients that are under way

    @property
    def serving(self) -> bool:
        """This node leads and has rolled forward: all it holds from earlier epochs is committed."""
        return self._core.rolled_forward and self._core.epoch == self._told

    @property
    def may_serve(self) -> bool:
        """Clients may be answered now. Looked at before every answer, since this process may have been stopped."""
        return self.serving and self._clock() < self.serve_until

    @property
    def follows(self) -> bool:
        """This node is a standby with most of the copies, has caught up with what its primary had when it joined, and
        hears it now. What it lacks it has from the primary when somebody wants it; where that would be most of all, the
        primary is to be asked."""
        core = self._core
        if 2 * core.missing > core.instances:
            return False
        if core.leading or not (core.joined and core.linked and core.whole) or core.whole_at is None:
            return False
        # By round trip: what lay in a buffer while this process was stopped says nothing of now.
        heard = self._clock() - core.read_from <= core.limits.peer_timeout_s
        return heard and core.commit >= core.whole_at

    @property
    def may_read(self) -> bool:
        """Queries and retrieves may be answered, from this copy."""
        return self._up_to_date or (self._isolated_reads and self.isolated)

    @property
    def _up_to_date(self) -> bool:
        return self.may_serve or (self._standby_reads and self.follows)

    @property
    def isolated(self) -> bool:
        """Neither etcd nor the other node is heard, and what was complete here may have been overtaken meanwhile."""
        return not self._etcd_ok and not self._core.linked and self._core.whole

    def tell(self, tell: Tell) -> None:
        core = self._core
        self._etcd_ok = tell.etcd_ok
        self.serve_until = tell.serve_until
        if tell.role == "follow":
            self._told = 0
            core.grants.withhold = tell.withhold
            core.follow(resign=tell.resign)
            if tell.released and tell.released == core.promised:
                core.grants.release()
        elif core.leading and core.epoch == tell.epoch:
            if (ask := core.in_sync.ask) and tell.answered == self._nonce(ask):
                core.answered(ask.token)
            if tell.lineage and not core.lineage:
                self._note_lineage(tell.lineage)
        elif tell.epoch > core.promised and tell.epoch != self._told and tell.in_sync:
            self._told = tell.epoch
            if not core.lineage:
                self._note_lineage(tell.lineage)
            self._task = asyncio.get_running_loop().create_task(self._lead(tell.epoch, frozenset(tell.in_sync)))
        self._flush()

    def _note_lineage(self, lineage: str) -> None:
        """A new log begins, under the name that the cluster has for it."""
        if lineage:
            self._core.lineage = lineage
            self.note_lineage(lineage)

    async def led(self) -> None:
        """Wait until this node leads, after it was told to."""
        if self._task:
            await self._task

    async def _lead(self, epoch: int, in_sync: frozenset[str]) -> None:
        core = self._core
        core.follow()
        core.grants.withhold = True
        core.promise(epoch)
        self._flush()
        await self._persist_promise(epoch)
        while not core.idle or self._clock() < core.grants.given_until:
            self._abandon()
            self._flush()
            await asyncio.sleep(POLL_S)
        if self._told != epoch or self._task is not asyncio.current_task():
            return  # told otherwise meanwhile, or told the same anew
        if core.promised != epoch or not core.good_enough(in_sync):
            self._told = 0
            return
        core.lead(epoch, in_sync, self._clock())
        self._flush()

    def stepped_down(self) -> None:
        """The core saw a higher epoch."""
        if not self._core.leading and self._told and self._told <= self._core.epoch:
            self._told = 0

    def standing(self) -> tuple[object, ...]:
        """What the HA agent should hear of at once when it changes; the rest it hears a few times a second."""
        core = self._core
        bound = core.grants.given_until > NEVER
        return (
            core.role,
            core.promised,
            core.whole,
            core.linked,
            core.grants.withhold,
            bound,
            core.peer_foreign,
            core.in_sync.ask,
            self.serving,
            self._fit(),
        )

    def report(self, cluster_id: str) -> Report:
        core = self._core
        hello = core.peer_hello
        peer = Member(hello.node, hello.store_id, hello.incarnation) if hello else None
        has_all = core.leading and core.joined and core.peer_acked == core.last[1]
        ask = core.in_sync.ask
        asked = Asked(tuple(sorted(ask.members)), self._nonce(ask)) if ask else None
        return Report(
            store_id=core.store_id,
            incarnation=core.incarnation,
            cluster_id=cluster_id,
            promised=core.promised,
            leading=self._told,
            serving=self.serving,
            whole=core.whole,
            last=core.last,
            linked=core.linked,
            peer=peer,
            peer_last=core.last if has_all else core.peer_last,
            grant_until=max(core.grants.had_until, NEVER),
            granted_until=max(core.grants.given_until, NEVER),
            withhold=core.grants.withhold,
            asked=asked,
            fit=self._fit(),
            peer_whole=hello.whole if hello else True,
            busy=self.busy(),
            pid=os.getpid(),
            reads=self._up_to_date,
            answered_at=self._first_answer(),
            lineage=core.lineage,
            peer_promised=hello.promised if hello else 0,
            peer_leads=bool(hello and hello.leading),
            foreign=core.peer_foreign,
            features=FEATURES,
            commit=core.commit,
            missing=core.missing,
            peer_missing=core.peer_lacks,
        )

    def _first_answer(self) -> float:
        core = self._core
        if not self.serving:
            self._begun = None
        elif self._begun is None or self._begun[0] != core.epoch:
            self._begun, self._answered_at = (core.epoch, core.commit), NEVER
        elif self._answered_at == NEVER and core.commit > self._begun[1]:
            self._answered_at = self._clock()
        return self._answered_at

    def _nonce(self, ask: Ask) -> str:
        return f"{self._core.epoch}.{self._core.incarnation}.{ask.token}"
