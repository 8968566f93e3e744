"""The HA agent: looks at etcd, the gateway and the clock, asks `decide`, and carries the answer out. No policy here.

Two loops: one keeps the lease and reads etcd, the other decides. A decision that writes to etcd runs beside the
loop, one at a time, so that a slow etcd never holds up telling the gateway until when it may serve.
"""

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Callable

import msgspec
import structlog

from conf import VERSION
from conf.telling import place_of
from ha.decide import (
    Acquire,
    Action,
    Bump,
    Change,
    CreateState,
    GiveReads,
    Release,
    Serve,
    ServeReads,
    StopFollowers,
    TakeReads,
    View,
    check_invariants,
    decide,
)
from ha.etcd import Compare, DeleteKey, Etcd, EtcdError, PutKey
from ha.ports import GatewayLink, Site
from ha.records import MemberValue, Records, StateValue, Takeover, chronicle, encode, read
from storage.control import NEVER, Member, Report, Tell

log = structlog.get_logger()

DECIDE_INTERVAL_S = 0.2
RESIGN_S = 2.0
UNKNOWN_GRANT_S = 2.5  # a promise of the other node that an agent before this one may have counted on
TROUBLE_S = 600.0  # a node that was in trouble isn't trusted for so long: else two such nodes would hand over for ever
STARTS_S = 60.0
HISTORY_MAX = 500
MARGIN_S = 0.3  # of the lease, for clocks that run at slightly different speeds and for work between look and act


Mutation = CreateState | Acquire | Bump | Change | Release | TakeReads | GiveReads
Quiet = Tell | Serve | ServeReads | StopFollowers


class Agent:
    def __init__(
        self,
        *,
        node: str,
        peer: str,
        cluster: str,
        ttl_s: float,
        gateway_grace_s: float,
        etcd: Etcd,
        gateway: GatewayLink,
        site: Site,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        gateway_starts: int = 5,
        reached: Callable[[str], None] = lambda _: None,
        wake: asyncio.Event | None = None,
    ) -> None:
        """`reached(name)` is called at named points, for tests that let the process die there."""
        self.node, self.peer = node, peer
        self._reached = reached
        self.prefix = f"/tandem/{cluster}/"
        self._ttl_s, self._grace_s = ttl_s, gateway_grace_s
        self._etcd, self._gateway, self._site, self._clock, self._new_id = etcd, gateway, site, clock, new_id
        self._starts_max = gateway_starts
        self._starts: list[tuple[float, int]] = []  # when another incarnation of the gateway was first heard
        self._trouble, self._trouble_at = "", NEVER
        self._draining_since: float | None = None
        self._floor_at = NEVER
        self._said_as_member: MemberValue | None = None
        self._started_at = clock()
        self._lease = 0
        self._lease_deadline = NEVER
        self.records = Records()
        self._reads_given = 0  # revision of the key `reader` that this node has begun to give back: never used again
        self._reads_able_at = NEVER
        # Until when the gateway was ever told that it may serve; the agent before this one may have told it so much.
        self._told_until = clock() + ttl_s + UNKNOWN_GRANT_S
        self._resigned = 0  # the epoch in which the gateway was last told to resign: it never leads in it again
        self._leader_absent_since: float | None = None
        self._reader_absent_since: float | None = None
        self._peer_silent_since: float | None = None
        self._takeover = Takeover()
        self._read_at = NEVER
        self._gateway_lost_at: float | None = None
        self._mutation: asyncio.Task[None] | None = None
        self._last_said = ""
        self.wake = wake or asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._etcd_loop())
            group.create_task(self._decide_loop())

    # -- etcd --------------------------------------------------------------------------------------------------

    async def resign(self) -> None:
        """On a proper stop, with the addresses gone: free the other node of its promise and give the lease back, so
        that it needn't wait for either to run out."""
        await self._gateway.tell(Tell("follow", resign=self._site.dark))
        deadline = self._clock() + RESIGN_S
        while (report := self._gateway.report) is not None and report.leading:
            if self._clock() > deadline:
                log.warning("lease.not_revoked", why="the gateway hasn't stopped serving")
                return
            await asyncio.sleep(0.02)
        if not (self._site.dark and self._site.reads_dark):
            log.warning("lease.not_revoked", why="the addresses may still be here")
            return
        try:
            if self._lease:
                await self._etcd.revoke(self._lease)
        except EtcdError as error:
            log.warning("lease.not_revoked", why=str(error))

    async def _etcd_loop(self) -> None:
        interval = self._ttl_s / 6
        while True:
            try:
                await self._look()
                await self._keep_lease()
            except EtcdError as error:
                log.warning("etcd.unreachable", error=str(error))
            self.wake.set()
            await asyncio.sleep(interval)

    async def look_now(self) -> None:
        """Called when a watch says that something changed."""
        try:
            await self._look()
        except EtcdError:
            return
        self.wake.set()

    async def _look(self) -> None:
        asked_at = self._clock()
        found = {kv.key.removeprefix(self.prefix): kv for kv in await self._etcd.get_prefix(self.prefix)}
        if asked_at < self._read_at:
            return  # an answer to a later question came first
        try:
            self.records = read(found, self.records, self._clock())
        except (msgspec.DecodeError, ValueError) as error:
            raise EtcdError(f"a record below {self.prefix} isn't ours: {error}") from error
        self._read_at = asked_at
        self._leader_absent_since = self._absent(self.records.leader is None, self._leader_absent_since)
        self._reader_absent_since = self._absent(self.records.reader is None, self._reader_absent_since)

    def _absent(self, absent: bool, since: float | None) -> float | None:
        if not absent:
            return None
        return since if since is not None else self._clock()

    async def _keep_lease(self) -> None:
        for holder in (self.records.leader, self.records.reader):
            if not self._lease and holder and holder.node == self.node:
                self._lease = holder.lease  # this agent was restarted: go on with the lease of the one before
        if self._lease:
            sent_at = self._clock()
            ttl_s = await self._etcd.keepalive(self._lease)
            if ttl_s > 0:
                self._lease_deadline = sent_at + ttl_s - MARGIN_S
                await self._say_as_member()
                return
            log.warning("lease.lost")
            self._lease, self._lease_deadline = 0, NEVER
        sent_at = self._clock()
        self._lease = await self._etcd.grant(math.ceil(self._ttl_s))
        self._lease_deadline = sent_at + math.ceil(self._ttl_s) - MARGIN_S
        self._said_as_member = None  # it went with the lease before
        await self._say_as_member()

    async def _say_as_member(self) -> None:
        report = self._gateway.report
        value = MemberValue(self.node, self._trouble, VERSION, report.features if report else 0)
        if value != self._said_as_member:
            await self._etcd.txn((), (PutKey(f"{self.prefix}members/{self.node}", encode(value), self._lease),))
            self._said_as_member = value

    # -- decisions ---------------------------------------------------------------------------------------------

    async def _decide_loop(self) -> None:
        while True:
            await self.step()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), DECIDE_INTERVAL_S)
            self.wake.clear()

    @property
    def etcd_ok(self) -> bool:
        """What was read is not older than a lease."""
        return self._clock() - self._read_at < self._ttl_s

    def view(self) -> View:
        now = self._clock()
        report = self._gateway.report
        if report is not None and 0 < report.leading <= self._resigned:  # said before it heard that it is to resign
            report = msgspec.structs.replace(report, leading=0, serving=False)
        if report is not None:
            self._gateway_lost_at = None
        elif self._gateway_lost_at is None:
            self._gateway_lost_at = now
        self._note(report, now)
        records = self.records
        peer = records.members.get(self.peer)
        return View(
            node=self.node,
            peer=self.peer,
            now=now,
            ttl_s=self._ttl_s,
            started_at=self._started_at,
            gateway_grace_s=self._grace_s,
            looked=self._read_at > NEVER,
            etcd_ok=self.etcd_ok,
            state=records.state,
            leader=records.leader,
            leader_absent_since=self._leader_absent_since,
            lease=self._lease,
            lease_deadline=self._lease_deadline,
            gateway=report,
            gateway_lost_at=self._gateway_lost_at,
            switchover=records.switchover,
            paused=records.paused,
            peer_present=peer is not None and not peer.trouble and self.peer not in records.maintained,
            trouble=self._trouble,
            draining_since=self._draining_since,
            maintained=self.node in records.maintained,
            reads_wanted=self._site.reads_wanted,
            reads_able=self._site.reads_able,
            reads_able_at=self._reads_able_at,
            reads_given=records.reader is not None and records.reader.revision == self._reads_given,
            reader=records.reader,
            reader_absent_since=self._reader_absent_since,
            up=self._site.up,
            gateway_dead=report is None and self._gateway.dead,
            released=records.released,
            following=self._site.following,
            follow_stop_s=self._site.follow_stop_s,
            floor_at=self._floor_at,
        )

    def _note(self, report: Report | None, now: float) -> None:
        """Remember when the other node fell silent, how often the gateway starts, and what is wrong here."""
        if report is not None and report.reads:
            self._reads_able_at = now
        if report is not None and report.linked:
            self._peer_silent_since = None
        elif self._peer_silent_since is None:
            self._peer_silent_since = now
        if report is not None and (not self._starts or self._starts[-1][1] != report.incarnation):
            self._starts = [*self._starts[-self._starts_max :], (now, report.incarnation)]
        often = sum(now - at < STARTS_S for at, _ in self._starts) > self._starts_max
        trouble = "the gateway keeps ending" if often else self._site.trouble
        if trouble:
            if not self._trouble:
                log.error("node.trouble", why=trouble)
            self._trouble, self._trouble_at = trouble, now
        elif self._trouble and now - self._trouble_at > TROUBLE_S:
            log.info("node.trouble_over", was=self._trouble)
            self._trouble = ""

    async def step(self) -> None:
        view = self.view()
        actions = decide(view)
        check_invariants(view, actions)
        self._say(actions)
        draining = any(isinstance(one, StopFollowers) or (isinstance(one, Tell) and one.drain) for one in actions)
        self._draining_since = (self._draining_since or view.now) if draining else None
        self._site.drain(draining)
        for action in actions:
            await self._carry_out(action, view)
        self._takeover.look(view, self._site.up, self._site.parts)
        if self._takeover.unwritten and self._idle and view.etcd_ok:
            self._mutation = asyncio.create_task(self._write_history(view))

    @property
    def took_over(self) -> float | None:
        """When this agent last took over from the other node without having been asked to, wall clock."""
        return self._takeover.at if self._takeover.row.get("by") == "takeover" else None

    @property
    def _idle(self) -> bool:
        return self._mutation is None or self._mutation.done()

    def _say(self, actions: list[Action]) -> None:
        said = ",".join(sorted(type(action).__name__ for action in actions if not isinstance(action, Quiet)))
        if said and said != self._last_said:
            log.info("decided", actions=said)
        self._last_said = said

    async def _carry_out(self, action: Action, view: View) -> None:
        match action:
            case Tell():
                told = self._informed(action, view)
                if told.role == "lead":
                    self._told_until = max(self._told_until, told.serve_until)
                if told.resign and view.gateway is not None:
                    self._resigned = max(self._resigned, view.gateway.leading)
                await self._gateway.tell(told)
            case Serve(here=True):
                seconds = action.until - self._clock()
                if seconds > 0:
                    await self._site.serve(seconds)
            case Serve():
                await self._site.leave()
            case ServeReads(here=True):
                seconds = action.until - self._clock()
                if seconds > 0:
                    await self._site.serve_reads(seconds)
            case ServeReads():
                await self._site.leave_reads()
            case StopFollowers():
                pass  # the site was told already
            case _:
                if self._idle:
                    if isinstance(action, Acquire) and not self._site.up:
                        self._site.look_ahead()
                    self._mutation = asyncio.create_task(self._mutate(action, view))

    def _informed(self, tell: Tell, view: View) -> Tell:
        """The decision with what the gateway shows in its status."""
        state = view.state
        return msgspec.structs.replace(
            tell,
            resign=tell.resign and self._site.dark,
            cluster_id=state.cluster_id if state else "",
            lineage=state.lineage if state else "",
            primary=view.leader.node if view.leader else "",
            members=tuple(member.node for member in state.in_sync) if state else (),
            vips=self._site.vips,
            share=self._site.share,
            follow=self._site.followed,
            etcd_ok=view.etcd_ok,
            trouble=view.trouble,
            alarms=self._site.alarms,
        )

    async def _mutate(self, action: Mutation, view: View) -> None:
        # It may still arrive, whatever becomes of it: what it gives up isn't used any more in the meantime.
        if isinstance(action, GiveReads) and view.reader is not None:
            self._reads_given = view.reader.revision
        try:
            done = await self._write(action, view)
            log.info("wrote", action=type(action).__name__, done=done)
            await self._look()
        except EtcdError as error:
            log.warning("write.unknown", action=type(action).__name__, error=str(error))
        except Exception as error:  # whatever it was, the next decision looks anew
            log.error("write.failed", action=type(action).__name__, error=place_of(error))
        self.wake.set()

    async def _write(self, action: Mutation, view: View) -> bool:
        state = f"{self.prefix}state"
        if isinstance(action, TakeReads | GiveReads):
            return await self._write_reader(action, view)
        if isinstance(action, Release):
            return await self._write_release(action, view)
        if isinstance(action, CreateState):
            if view.gateway is None:
                return False
            me = Member(self.node, view.gateway.store_id, view.gateway.incarnation)
            lineage = view.gateway.lineage or self._new_id()  # a log that was begun alone goes on
            value = StateValue(self._new_id(), 0, "", (me,), self._new_id(), lineage)
            return await self._etcd.txn((Compare(state, "create", 0),), (PutKey(state, encode(value)),))
        if view.state is None:
            return False
        old, unchanged = view.state, Compare(state, "mod", view.state.revision)
        lineage = old.lineage or (view.gateway.lineage if view.gateway else "")
        if isinstance(action, Change):
            epoch, nonce, floor = old.epoch, action.nonce, max(old.floor, action.floor)
            if action.floor:
                self._floor_at = view.now
        else:
            epoch, nonce, floor = old.epoch + 1, self._new_id(), old.floor
        value = StateValue(old.cluster_id, epoch, self.node, action.in_sync, nonce, lineage, floor)
        puts: list[PutKey | DeleteKey] = [PutKey(state, encode(value))]
        row = chronicle(action, old, view, time.time())
        if value.epoch != old.epoch:
            puts.append(PutKey(self._history_key(value.epoch), json.dumps(row)))
            if value.epoch > HISTORY_MAX:
                puts.append(DeleteKey(self._history_key(value.epoch - HISTORY_MAX)))
        free, held = Compare(self._leader_key, "create", 0), self._held(view)
        if isinstance(action, Acquire):
            done = DeleteKey(f"{self.prefix}switchover")
            leader = PutKey(self._leader_key, self.node, self._lease)
            written = await self._etcd.txn((free, unchanged), [leader, *puts, done])
        else:
            written = await self._etcd.txn((held, unchanged), puts)
        if written and value.epoch != old.epoch:
            self._reached("acquired")
            self._takeover.begun(row, self._clock(), self._peer_silent_since, view.leader_absent_since)
        return written

    @property
    def _leader_key(self) -> str:
        return f"{self.prefix}leader"

    def _history_key(self, epoch: int) -> str:
        return f"{self.prefix}history/{epoch:08d}"

    def _held(self, view: View) -> Compare:
        return Compare(self._leader_key, "create", view.leader.revision if view.leader else 0)

    async def _write_release(self, action: Release, view: View) -> bool:
        if not (self._site.dark and await self._gateway_stopped(view)):
            return False  # it is tried again, and the lease is kept until then
        # Whatever becomes of it, it may still arrive: what it gives up isn't used any more in the meantime.
        if view.state is not None:
            self._resigned = max(self._resigned, view.state.epoch)
        still = [self._held(view)]
        if view.state is not None:  # a release that comes late must not end the next epoch
            still.append(Compare(f"{self.prefix}state", "mod", view.state.revision))
        dead = [PutKey(f"{self.prefix}released", str(action.dead_in))] if action.dead_in else []
        return await self._etcd.txn(still, (DeleteKey(self._leader_key), *dead))

    async def _gateway_stopped(self, view: View) -> bool:
        """The gateway answers nobody by this lease any more: it says so, it is dead, or the last moment that it was
        told is over. A silent one may go on until then."""
        deadline = self._clock() + RESIGN_S
        while True:
            report = self._gateway.report
            if (report is not None and report.leading == 0) or (report is None and self._gateway.dead):
                return True
            if self._clock() >= self._told_until:
                return True
            if self._clock() >= deadline:
                log.warning("release.waits", why="the gateway hasn't stopped serving")
                return False
            await asyncio.sleep(0.02)

    async def _write_reader(self, action: TakeReads | GiveReads, view: View) -> bool:
        key = f"{self.prefix}reader"
        if isinstance(action, TakeReads):
            return await self._etcd.txn((Compare(key, "create", 0),), (PutKey(key, self.node, self._lease),))
        if not self._site.reads_dark or view.reader is None:
            return False
        return await self._etcd.txn((Compare(key, "create", view.reader.revision),), (DeleteKey(key),))

    async def _write_history(self, view: View) -> None:
        """The parts of the last takeover, as far as they are known. Nothing depends on them."""
        row, self._takeover.unwritten = self._takeover.row, False
        with contextlib.suppress(EtcdError):
            await self._etcd.txn((self._held(view),), (PutKey(self._history_key(row["epoch"]), json.dumps(row)),))
