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
from typing import Any, Protocol

import msgspec
import structlog

from ha.decide import (
    Acquire,
    Action,
    Bump,
    Change,
    CreateState,
    Leader,
    Release,
    Serve,
    State,
    Switchover,
    View,
    check_invariants,
    decide,
)
from ha.etcd import Compare, DeleteKey, Etcd, EtcdError, KeyValue, PutKey
from storage.control import NEVER, Member, Report, Tell

log = structlog.get_logger()

DECIDE_INTERVAL_S = 0.2
RESIGN_S = 2.0
MARGIN_S = 0.3  # of the lease, for clocks that run at slightly different speeds and for work between look and act


class GatewayLink(Protocol):
    """The gateway on this node: its last report, None while it is away, and a way to tell it its role."""

    @property
    def report(self) -> Report | None: ...

    @property
    def dead(self) -> bool:
        """The process that reported last has ended, for certain."""
        ...

    async def tell(self, tell: Tell) -> None: ...


class Site(Protocol):
    """What makes clients reach this node: addresses, fence, share."""

    @property
    def up(self) -> bool: ...
    async def serve(self, seconds: float) -> None:
        """Be here, let through by the kernel for `seconds` from now unless refreshed."""
        ...

    async def leave(self) -> None: ...


class StateValue(msgspec.Struct, frozen=True):
    """`state` as it is written to etcd."""

    cluster_id: str
    epoch: int
    primary: str
    in_sync: tuple[Member, ...]
    nonce: str


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
        vips: tuple[str, ...] = (),
        wake: asyncio.Event | None = None,
    ) -> None:
        self.node, self.peer = node, peer
        self.prefix = f"/tandem/{cluster}/"
        self._ttl_s, self._grace_s = ttl_s, gateway_grace_s
        self._etcd, self._gateway, self._site, self._clock, self._new_id = etcd, gateway, site, clock, new_id
        self._vips = vips
        self._started_at = clock()
        self._lease = 0
        self._lease_deadline = NEVER
        self._state: State | None = None
        self._leader: Leader | None = None
        self._paused = False
        self._peer_present = False
        self._released = 0
        self._resigned = 0  # the epoch in which the gateway was last told to resign: it never leads in it again
        self._switchover: Switchover | None = None
        self._leader_absent_since: float | None = None
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
        """On a proper stop: give the lease back, so that the other node needn't wait for it to run out."""
        await self._gateway.tell(Tell("follow"))
        deadline = self._clock() + RESIGN_S
        while (report := self._gateway.report) is not None and report.leading:
            if self._clock() > deadline:
                log.warning("lease.not_revoked", why="the gateway hasn't stopped serving")
                return
            await asyncio.sleep(0.02)
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
        self._read_at = asked_at
        self._state = _state(found.get("state"))
        self._paused = "pause" in found
        self._released = int(found["released"].value) if "released" in found else 0
        self._peer_present = f"members/{self.peer}" in found
        self._note_switchover(found.get("switchover"))
        self._leader = _leader(found.get("leader"))
        if self._leader:
            self._leader_absent_since = None
        elif self._leader_absent_since is None:
            self._leader_absent_since = self._clock()

    def _note_switchover(self, kv: KeyValue | None) -> None:
        if kv is None:
            self._switchover = None
        elif self._switchover is None or self._switchover.revision != kv.mod_revision:
            self._switchover = Switchover(kv.value, self._clock(), kv.mod_revision)

    async def _keep_lease(self) -> None:
        if not self._lease and self._leader and self._leader.node == self.node:
            self._lease = self._leader.lease  # this agent was restarted: go on with the lease of the one before
        if self._lease:
            sent_at = self._clock()
            ttl_s = await self._etcd.keepalive(self._lease)
            if ttl_s > 0:
                self._lease_deadline = sent_at + ttl_s - MARGIN_S
                return
            log.warning("lease.lost")
            self._lease, self._lease_deadline = 0, NEVER
        sent_at = self._clock()
        self._lease = await self._etcd.grant(math.ceil(self._ttl_s))
        self._lease_deadline = sent_at + math.ceil(self._ttl_s) - MARGIN_S
        member = json.dumps({"node": self.node})
        await self._etcd.txn((), (PutKey(f"{self.prefix}members/{self.node}", member, self._lease),))

    # -- decisions ---------------------------------------------------------------------------------------------

    async def _decide_loop(self) -> None:
        while True:
            await self.step()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), DECIDE_INTERVAL_S)
            self.wake.clear()

    def view(self) -> View:
        now = self._clock()
        report = self._gateway.report
        if report is not None and 0 < report.leading <= self._resigned:  # said before it heard that it is to resign
            report = msgspec.structs.replace(report, leading=0, serving=False)
        if report is not None:
            self._gateway_lost_at = None
        elif self._gateway_lost_at is None:
            self._gateway_lost_at = now
        return View(
            node=self.node,
            peer=self.peer,
            now=now,
            ttl_s=self._ttl_s,
            started_at=self._started_at,
            gateway_grace_s=self._grace_s,
            looked=self._read_at > NEVER,
            etcd_ok=now - self._read_at < self._ttl_s,
            state=self._state,
            leader=self._leader,
            leader_absent_since=self._leader_absent_since,
            lease=self._lease,
            lease_deadline=self._lease_deadline,
            gateway=report,
            gateway_lost_at=self._gateway_lost_at,
            switchover=self._switchover,
            paused=self._paused,
            peer_present=self._peer_present,
            gateway_dead=report is None and self._gateway.dead,
            released=self._released,
        )

    async def step(self) -> None:
        view = self.view()
        actions = decide(view)
        check_invariants(view, actions)
        self._say(actions)
        for action in actions:
            await self._carry_out(action, view)

    def _say(self, actions: list[Action]) -> None:
        said = ",".join(sorted(type(action).__name__ for action in actions if not isinstance(action, Tell | Serve)))
        if said and said != self._last_said:
            log.info("decided", actions=said)
        self._last_said = said

    async def _carry_out(self, action: Action, view: View) -> None:
        match action:
            case Tell():
                told = self._informed(action, view)
                if told.resign and view.gateway is not None:
                    self._resigned = max(self._resigned, view.gateway.leading)
                await self._gateway.tell(told)
            case Serve(here=True):
                seconds = action.until - self._clock()
                if seconds > 0:
                    await self._site.serve(seconds)
            case Serve():
                await self._site.leave()
            case _:
                if self._mutation is None or self._mutation.done():
                    self._mutation = asyncio.create_task(self._mutate(action, view))

    def _informed(self, tell: Tell, view: View) -> Tell:
        """The decision with what the gateway shows in its status."""
        up, state = self._site.up, view.state
        return msgspec.structs.replace(
            tell,
            resign=tell.resign and not up,
            cluster_id=state.cluster_id if state else "",
            primary=view.leader.node if view.leader else "",
            members=tuple(member.node for member in state.in_sync) if state else (),
            vips=self._vips if up else (),
            share=up,
            etcd_ok=view.etcd_ok,
        )

    async def _mutate(self, action: CreateState | Acquire | Bump | Change | Release, view: View) -> None:
        try:
            done = await self._write(action, view)
            log.info("wrote", action=type(action).__name__, done=done)
            await self._look()
        except EtcdError as error:
            log.warning("write.unknown", action=type(action).__name__, error=str(error))
        self.wake.set()

    async def _write(self, action: CreateState | Acquire | Bump | Change | Release, view: View) -> bool:
        leader, state = f"{self.prefix}leader", f"{self.prefix}state"
        if isinstance(action, Release):
            still = [Compare(leader, "create", view.leader.revision if view.leader else 0)]
            if view.state is not None:  # a release that comes late must not end the next epoch
                still.append(Compare(state, "mod", view.state.revision))
            sure = action.dead_in and not self._site.up
            dead = [PutKey(f"{self.prefix}released", str(action.dead_in))] if sure else []
            return await self._etcd.txn(still, (DeleteKey(leader), *dead))
        if isinstance(action, CreateState):
            if view.gateway is None:
                return False
            me = Member(self.node, view.gateway.store_id, view.gateway.incarnation)
            value = StateValue(self._new_id(), 0, "", (me,), self._new_id())
            return await self._etcd.txn((Compare(state, "create", 0),), (PutKey(state, _json(value)),))
        if view.state is None:
            return False
        old, unchanged = view.state, Compare(state, "mod", view.state.revision)
        if isinstance(action, Change):
            value = StateValue(old.cluster_id, old.epoch, self.node, action.in_sync, action.nonce)
        else:
            value = StateValue(old.cluster_id, old.epoch + 1, self.node, action.in_sync, self._new_id())
        puts = [PutKey(state, _json(value))]
        if value.epoch != old.epoch:
            why = json.dumps(_chronicle(action, old, view))
            puts.append(PutKey(f"{self.prefix}history/{value.epoch:08d}", why))
        if isinstance(action, Acquire):
            free = Compare(leader, "create", 0)
            done = DeleteKey(f"{self.prefix}switchover")
            return await self._etcd.txn((free, unchanged), [PutKey(leader, self.node, self._lease), *puts, done])
        held = Compare(leader, "create", view.leader.revision if view.leader else 0)
        return await self._etcd.txn((held, unchanged), puts)


def _chronicle(action: Acquire | Bump | Change, old: State, view: View) -> dict[str, Any]:
    """What `tandem history` shows of a change of epoch."""
    why = "switchover" if view.switchover else "takeover" if old.primary != view.node else "again"
    waited = view.now - view.leader_absent_since if view.leader_absent_since is not None else 0.0
    return {
        "epoch": old.epoch + 1,
        "primary": view.node,
        "before": old.primary,
        "by": "restart" if isinstance(action, Bump) else why,
        "in_sync": [member.node for member in action.in_sync],
        "leaderless_s": round(waited, 2),
        "at": time.time(),
    }


def _json(value: StateValue) -> str:
    return msgspec.json.encode(value).decode()


def _state(kv: KeyValue | None) -> State | None:
    if kv is None:
        return None
    value = msgspec.json.decode(kv.value, type=StateValue)
    return State(value.cluster_id, value.epoch, value.primary, value.in_sync, value.nonce, kv.mod_revision)


def _leader(kv: KeyValue | None) -> Leader | None:
    return None if kv is None else Leader(kv.value, kv.lease, kv.create_revision)
