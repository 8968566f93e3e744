"""The virtual addresses that are in the same place: taken and refreshed together, announced, watched on the wire.

`until` is a time of time.monotonic(): the end of this node's right to have the addresses. Nothing here goes past it.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from conf.settings import VirtualAddress
from ha.reach import neighbours, vip
from ha.reach.fence import Fence, FenceFailed
from ha.reach.neighbours import Address
from ha.reach.tickle import Connection, connections_to, tickle

log = structlog.get_logger()

ANNOUNCE_AT_S: Final = (0.0, 0.5, 1.5)  # after the address was taken: one announcement may be lost
ANNOUNCE_AGAIN_S: Final = 30.0
TICKLE_AT_S: Final = (0.0, 0.5, 1.0)
PROBE_S: Final = 0.1  # a host on the same segment answers within a millisecond
ASK_AGAIN_S: Final = 10.0
CONFLICT_AGAIN_S: Final = 5.0
CONFLICT_OVER_S: Final = 30.0
DEFEND_AGAIN_S: Final = 10.0
AHEAD_S: Final = 1.0  # so old may be what was found out ahead
SETTLED_S: Final = 1.0  # what the node before said of the address may still be on its way


class AddressGroup:
    def __init__(self, vips: Sequence[VirtualAddress], whole_fence: Fence) -> None:
        """`whole_fence` has the addresses of all groups; it is made again should somebody have flushed it."""
        self._all, self._whole_fence = tuple(vips), whole_fence
        self._here: tuple[VirtualAddress, ...] = ()
        self._listener: neighbours.Listener | None = None
        self._took_at = 0.0
        self._announcements = 0
        self._tickles = 0
        self._checked_at = 0.0
        self._announced_at = self._asked_at = 0.0
        self._defended_at = float("-inf")
        self._ahead_at, self._ahead = float("-inf"), dict[Address, bytes]()  # what was found out ahead
        self._claimed_at: dict[VirtualAddress, float] = {}
        self.conflicts: dict[str, str] = {}  # address -> MAC that claims it too
        self.clients: tuple[Connection, ...] = ()  # those of the node that had the addresses before

    @property
    def here(self) -> tuple[str, ...]:
        return tuple(one.address for one in self._here)

    @property
    def ips(self) -> tuple[str, ...]:
        return tuple(str(one.ip.ip) for one in self._here)

    def look_ahead(self) -> None:
        """Ask who has the addresses, so that `take` needn't wait for answers. To be done when neither node has them."""
        listener = neighbours.Listener()
        try:
            self._ahead = self._asked(listener, self._all)
            self._ahead_at = time.monotonic()
        finally:
            listener.close()

    def take(self, until: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Have the addresses, but for those that somebody else has; `meanwhile` is done before.

        Raises NoInterface, OSError or FenceFailed.
        """
        self._here = self._probed(self._all, meanwhile)
        self.refresh(until)
        self._took_at, self._announcements, self._tickles = time.monotonic(), 0, 0
        self._announce()
        self._tickle()

    def refresh(self, until: float) -> None:
        """Have them until then. The fence comes first: without it an address isn't kept. Raises as `take`."""
        self._light(until)
        left = until - time.monotonic()
        if left <= 0:
            raise OSError(0, "the lease ran out while the address was being taken")
        vip.add(self._here, left)

    def _light(self, until: float) -> None:
        try:
            Fence(self._here).light(until - time.monotonic())
        except FenceFailed as error:
            log.error("fence.gone", error=str(error))  # somebody has flushed the rules of this machine
            self._whole_fence.install()
            Fence(self._here).light(until - time.monotonic())

    def look_after(self, until: float) -> None:
        """Announce again, tickle again, look for who else has an address; every now and then. Raises as `take`."""
        if time.monotonic() > until:
            return
        self._announce()
        self._tickle()
        self._watch()
        missing = [one for one in self._all if one not in self._here]
        again = missing and time.monotonic() - self._checked_at > CONFLICT_AGAIN_S
        if again and (free := self._probed(missing)):
            self._here += free
            self.refresh(until)
            self._took_at, self._announcements = time.monotonic(), 0

    def give_up(self) -> tuple[Connection, ...]:
        """Returns the connections that were open when the addresses fell silent: whose answers don't come any more.

        Raises OSError if an address may still be here; without its address the fence doesn't matter.
        """
        ips, self._here = self.ips, ()
        self.conflicts.clear()
        self._claimed_at.clear()
        if self._listener:
            self._listener.close()
            self._listener = None
        try:
            Fence(self._all).darken()
        except FenceFailed as error:
            log.error("fence.gone", error=str(error))
        left = connections_to(ips) if ips else ()
        vip.remove(self._all)
        return left

    def _probed(
        self, vips: Sequence[VirtualAddress], meanwhile: Callable[[], None] = lambda: None
    ) -> tuple[VirtualAddress, ...]:
        """Those that nobody answers for."""
        if not vips:
            meanwhile()
            return ()
        now = self._checked_at = time.monotonic()
        if now - self._ahead_at < AHEAD_S:
            meanwhile()
            foreign = self._ahead | self._listening().foreign(vip.own_macs(), now)
        else:
            foreign = self._asked(self._listening(), vips, meanwhile)
        self._ahead_at = float("-inf")
        for one in vips:
            self._note(one, foreign.get(one.ip.ip))
        return tuple(one for one in vips if one.ip.ip not in foreign)

    def _asked(
        self,
        listener: neighbours.Listener,
        vips: Sequence[VirtualAddress],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[Address, bytes]:
        """Who else answers for which address; `meanwhile` is done while that is waited for."""
        for _ in listener.claims():
            pass  # of the past
        for one in vips:
            neighbours.ask(vip.interface_of(one), one.ip.ip)
        deadline = time.monotonic() + PROBE_S
        meanwhile()
        return listener.foreign(vip.own_macs(), deadline)

    def _note(self, one: VirtualAddress, mac: bytes | None) -> None:
        address = str(one.ip.ip)
        if mac is None:
            if self.conflicts.pop(address, None):
                log.info("vip.conflict_over", address=address)
        elif self.conflicts.get(address) != mac.hex(":"):
            self.conflicts[address] = mac.hex(":")
            log.critical("vip.duplicate", address=address, mac=mac.hex(":"), why="another machine answers for it")

    def _listening(self) -> neighbours.Listener:
        self._listener = self._listener or neighbours.Listener()
        return self._listener

    def _announce(self) -> None:
        now = time.monotonic()
        due = self._took_at + ANNOUNCE_AT_S[self._announcements] if self._announcements < len(ANNOUNCE_AT_S) else None
        if now >= (due if due is not None else self._announced_at + ANNOUNCE_AGAIN_S):
            self._announced_at = now
            self._announcements += 1
            for one in self._here:
                neighbours.announce(vip.interface_of(one), one.ip.ip)

    def _tickle(self) -> None:
        """A help for the clients; that it can't be given is no reason not to serve them."""
        now = time.monotonic()
        if self._tickles == len(TICKLE_AT_S) or now < self._took_at + TICKLE_AT_S[self._tickles]:
            return
        self._tickles += 1
        ips = self.ips
        shaken = [client for client in self.clients if client[2] in ips]
        if not shaken:
            return
        try:
            tickle(shaken)
            log.info("clients.tickled", count=len(shaken))
        except OSError as error:
            log.warning("clients.not_tickled", error=str(error))

    def _watch(self) -> None:
        """Somebody else claims an address that is here: say so, and claim it again now and then (RFC 5227 2.4 b)."""
        now = time.monotonic()
        claims = list(self._listening().claims())
        if now - self._took_at < SETTLED_S:
            return
        if now - self._asked_at > ASK_AGAIN_S:  # another machine's answers to others aren't seen here
            self._asked_at = now
            for one in self._here:
                neighbours.ask(vip.interface_of(one), one.ip.ip)
        own = vip.own_macs() if claims else frozenset()
        for one in self._here:
            address = one.ip.ip
            macs = {mac for claimed, mac in claims if claimed == address} - own
            if macs:
                self._claimed_at[one] = now
                self._note(one, min(macs))
                if now - self._defended_at > DEFEND_AGAIN_S:
                    self._defended_at = now
                    neighbours.announce(vip.interface_of(one), address)
            elif str(address) in self.conflicts and now - self._claimed_at.get(one, now) > CONFLICT_OVER_S:
                self._note(one, None)
