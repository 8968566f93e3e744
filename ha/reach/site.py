"""Puts the pieces together that make clients reach this node: share, addresses, announcements, fence; in that order."""

import asyncio
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import structlog

from conf.mounts import files_at
from conf.settings import FollowSettings, Settings
from ha.reach.address_group import AddressGroup
from ha.reach.fence import Fence, FenceFailed
from ha.reach.followed import Command, Program, Unit
from ha.reach.following import Following
from ha.reach.samba import Samba
from ha.reach.share import Share
from ha.reach.tickle import Connection, connections_to
from ha.reach.vip import LIFETIME_SLACK_S, NoInterface
from ha.reach.watchdog import Watchdog

log = structlog.get_logger()

FAILING_S = 5.0
SHARE_PATIENCE_S = 1.0  # images don't wait longer for the share
FAILURES = (FenceFailed, NoInterface, OSError, subprocess.SubprocessError)


class Place:
    """A group of addresses, and whether it is here."""

    def __init__(self, group: AddressGroup, until: float) -> None:
        self.group = group
        self.until = until  # time.monotonic(); at the start: what an agent before this one may have brought up
        self.up = self.left = False
        self.failing_since: float | None = None
        self._said = ""

    @property
    def dark(self) -> bool:
        """It was given up, or the kernel has taken the addresses away by now."""
        return self.left or (not self.up and time.monotonic() > self.until + LIFETIME_SLACK_S + 1)

    @property
    def failing(self) -> bool:
        return self.failing_since is not None and time.monotonic() - self.failing_since > FAILING_S

    def failed(self, what: str, error: BaseException) -> None:
        self.up = False
        self.failing_since = self.failing_since if self.failing_since is not None else time.monotonic()
        if str(error) != self._said:
            log.error(what, error=str(error))
        self._said = str(error)

    def good(self) -> None:
        self.failing_since, self._said = None, ""


def _following(settings: Settings) -> Following:
    follow = settings.cluster.follow if settings.cluster else ()

    def program(one: FollowSettings) -> Program:
        mark = f"{settings.cluster.name if settings.cluster else ''}/{settings.node.name}/{one.name}"
        return Unit(one.unit) if one.unit else Command(one, mark, settings.share.folder / "log" / f"{one.name}.log")

    return Following(follow, program, lambda: files_at(settings.share.mount))


class NodeSite:
    def __init__(self, settings: Settings) -> None:
        cluster = settings.cluster
        vips = cluster.vips if cluster else ()
        ttl_s = cluster.lease_ttl_s if cluster else 3.0
        self._fence = Fence(vips)
        inherited = time.monotonic() + ttl_s + 1
        groups = [
            AddressGroup([vip for vip in vips if vip.prefer == kind], self._fence) for kind in ("primary", "standby")
        ]
        self._main, self._reads = (Place(group, inherited) for group in groups)
        self.reads_wanted = any(vip.prefer == "standby" for vip in vips)
        self._watchdog = Watchdog(cluster.watchdog if cluster else "", ttl_s)
        self._share = Share(Samba(settings) if settings.share.enabled else None)
        self._following = _following(settings)
        self._draining = False
        self._end_s = ttl_s / 2
        self._refresh_s = min(1.0, ttl_s / 6)
        self._worker = ThreadPoolExecutor(1, "site")  # one after the other, also when this process is told to stop
        self._ahead: Future[None] | None = None
        self.parts: dict[str, float] = {}  # seconds that the last taking took, by part
        self.on_left: Callable[[tuple[Connection, ...]], None] = lambda _: None  # with the clients left behind

    def prepare(self) -> None:
        """Before the first decision. Raises FenceFailed."""
        self._fence.install()

    async def close(self) -> None:
        """At the end of the process, after `leave`."""
        await asyncio.to_thread(self._share.close)

    async def stop_following(self) -> None:
        """At the end of the process, before `leave`: within half a lease."""
        await asyncio.to_thread(self._following.close, self._end_s)

    # -- what the agent asks -----------------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        return self._main.up

    @property
    def reads_up(self) -> bool:
        return self._reads.up

    @property
    def dark(self) -> bool:
        return self._main.dark

    @property
    def reads_dark(self) -> bool:
        return self._reads.dark

    @property
    def reads_able(self) -> bool:
        """The addresses for reading can be brought up here, as far as is known."""
        return not self._reads.failing

    @property
    def vips(self) -> tuple[str, ...]:
        return self._main.group.here + self._reads.group.here

    @property
    def share(self) -> bool:
        return self.up and self._share.up

    @property
    def alarms(self) -> tuple[str, ...]:
        conflicts = self._main.group.conflicts | self._reads.group.conflicts
        return tuple(f"{address} is also claimed by {mac}" for address, mac in conflicts.items())

    @property
    def trouble(self) -> str:
        """Why this node can't serve well, "" if it can."""
        if self._main.failing:
            return "addresses can't be brought up"
        return self._share.trouble or self._following.trouble

    @property
    def following(self) -> bool:
        return not self._following.down

    @property
    def follow_stop_s(self) -> float:
        return self._following.stop_s

    @property
    def followed(self) -> dict[str, str]:
        return self._following.states

    def drain(self, wanted: bool) -> None:
        self._draining = wanted
        if wanted:
            self._following.want(False)

    def clients(self) -> tuple[Connection, ...]:
        """Connections to the addresses that are here."""
        ips = self._main.group.ips + self._reads.group.ips
        return connections_to(ips) if ips else ()

    def note_clients(self, clients: tuple[Connection, ...]) -> None:
        """Those of the other node, to be tickled should this one take over."""
        self._main.group.clients = self._reads.group.clients = clients

    # -- the primary's addresses and the share -----------------------------------------------------------------

    def look_ahead(self) -> None:
        """Find out who else has the addresses while etcd and the gateway are still at work."""
        if self._ahead is None or self._ahead.done():
            self._ahead = self._worker.submit(self._look_ahead)

    def _look_ahead(self) -> None:
        try:
            self._main.group.look_ahead()
        except Exception as error:  # it is only to save time: taking the addresses asks again, and says what is wrong
            log.info("site.not_asked_ahead", error=str(error))

    async def serve(self, seconds: float) -> None:
        if await self._have(self._main, seconds, self._take, "site.failed"):
            self._watchdog.feed()
            self._share.look_after()
        if self._main.up and not self._draining:
            self._following.want(True)

    async def leave(self) -> None:
        self._following.want(False, gently=False)
        if await self._let_go(self._main):
            self._watchdog.disarm()
            self._share.stop()
            log.info("site.down")

    async def serve_reads(self, seconds: float) -> None:
        await self._have(self._reads, seconds, self._take_reads, "reads.failed")

    async def leave_reads(self) -> None:
        await self._let_go(self._reads)

    def _take(self, until: float) -> None:
        started = time.monotonic()
        self.parts = {}
        self._main.group.take(until, self._start_share)
        self._main.up = True
        self.parts["address_s"] = round(time.monotonic() - started - self.parts["share_s"], 3)
        log.info("site.up", **self.parts)

    def _start_share(self) -> None:
        """First, so that whoever reaches the address finds it."""
        started = time.monotonic()
        self._share.start(SHARE_PATIENCE_S)
        self.parts["share_s"] = round(time.monotonic() - started, 3)

    def _take_reads(self, until: float) -> None:
        self._reads.group.take(until)
        self._reads.up = True
        log.info("reads.up", addresses=self._reads.group.here)

    # -- both --------------------------------------------------------------------------------------------------

    async def _have(self, place: Place, seconds: float, take: Callable[[float], None], what: str) -> bool:
        """True if something was done, and well."""
        until = time.monotonic() + seconds
        if place.up and until - place.until < self._refresh_s:
            return False
        place.left = False
        place.until = max(place.until, until)
        try:
            await self._off_loop(place.group.refresh if place.up else take, until)
            await self._off_loop(place.group.look_after, until)
        except FAILURES as error:
            place.failed(what, error)
            return False
        place.good()
        return True

    async def _let_go(self, place: Place) -> bool:
        """True if it has just gone."""
        if place.left:
            return False
        place.up = False
        try:
            clients = await asyncio.get_running_loop().run_in_executor(self._worker, place.group.give_up)
        except FAILURES as error:
            place.failed("site.leave_failed", error)
            return False
        place.left = True
        place.good()
        if clients:
            self.on_left(clients + self.clients())
        return True

    async def _off_loop(self, work: Callable[..., None], *given: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._worker, work, *given)
