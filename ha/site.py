"""Puts the pieces together that make clients reach this node: share, addresses, announcements, fence; in that order."""

import asyncio
import subprocess
import time

import structlog

from conf.settings import Settings
from ha.fence import Fence, FenceFailed
from ha.samba import Samba
from ha.vip import NoInterface, VirtualAddresses

log = structlog.get_logger()

ANNOUNCE_AGAIN_S = 30.0
SAMBA_CHECK_S = 1.0


class NodeSite:
    def __init__(self, settings: Settings) -> None:
        vips = settings.cluster.vips if settings.cluster else ()
        self._fence, self._addresses = Fence(vips), VirtualAddresses(vips)
        self._samba = Samba(settings) if settings.share.enabled else None
        self._has_vips = bool(vips)
        self._refresh_s = min(1.0, (settings.cluster.lease_ttl_s if settings.cluster else 3.0) / 6)
        self._until = 0.0
        self._announced_at = 0.0
        self._samba_checked_at = 0.0
        self._left = False
        self.up = False

    def prepare(self) -> None:
        """Before the first decision. Raises FenceFailed."""
        self._fence.install()

    async def serve(self, seconds: float) -> None:
        now = time.monotonic()
        try:
            if not self.up:
                await asyncio.to_thread(self._take, seconds)
            elif now + seconds - self._until >= self._refresh_s:
                await asyncio.to_thread(self._refresh, seconds)
            else:
                return
            self._until = now + seconds
            await self._look_after()
        except (FenceFailed, NoInterface, OSError, subprocess.SubprocessError) as error:
            log.error("site.failed", error=str(error))
            self.up = False

    async def leave(self) -> None:
        if self._left:
            return
        try:
            await asyncio.to_thread(self._give_up)
            self._left = True
        except (FenceFailed, OSError) as error:
            log.error("site.leave_failed", error=str(error))

    def _take(self, seconds: float) -> None:
        started = time.monotonic()
        if self._samba:
            self._samba.start()
        self._left = False
        self._addresses.add(seconds)
        left = seconds - (time.monotonic() - started)
        if left <= 0:
            raise OSError(0, "the lease ran out while the address was being taken")
        self._fence.light(left)
        self._addresses.announce()
        self.up = True
        self._announced_at = time.monotonic()
        log.info("site.up")

    def _refresh(self, seconds: float) -> None:
        started = time.monotonic()
        self._addresses.add(seconds)
        left = seconds - (time.monotonic() - started)
        if left > 0:
            self._fence.light(left)

    async def _look_after(self) -> None:
        now = time.monotonic()
        if now - self._announced_at > ANNOUNCE_AGAIN_S:
            self._announced_at = now
            await asyncio.to_thread(self._addresses.announce)
        if self._samba and now - self._samba_checked_at > SAMBA_CHECK_S:
            self._samba_checked_at = now
            if self._samba.pid is None:
                await asyncio.to_thread(self._samba.start)

    def _give_up(self) -> None:
        self._fence.darken()
        self.up = False
        if self._samba:
            self._samba.stop()
        if self._has_vips:
            self._addresses.remove()
        log.info("site.down")
