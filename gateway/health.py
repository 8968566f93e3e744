"""Health and metrics over HTTP, for load balancers and monitoring, on the node's own address.

/health/live      200 while this process answers
/health/ready     200 if this node serves or could take over: primary, or a complete standby that follows one
/health/primary   200 on the node that serves
/health/standby   200 on a complete standby; ?lag=N: at most N entries behind
/metrics          Prometheus
"""

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest

from conf.settings import HttpSettings
from gateway.metrics import Meter
from storage.store import Store

log = structlog.get_logger()

STATUS_S: Final = 1.0  # however often somebody asks
CONNECTIONS_MAX: Final = 64  # the longest open one makes room
IP_FREEBIND, IPV6_FREEBIND = 15, 78  # linux/in.h, linux/in6.h
KEEP_S: Final = 15.0  # an idle connection
GAUGES: Final = {
    "tandem_primary": "1 on the node that serves",
    "tandem_in_sync": "Nodes that hold everything that was acknowledged",
    "tandem_epoch": "Epoch of the present primary",
    "tandem_instances": "Instances in the catalogue",
    "tandem_studies": "Studies in the catalogue",
    "tandem_bytes": "Bytes of all instances",
    "tandem_single_copy": "Objects whose only copy is on this node",
    "tandem_missing": "Copies of this node that are to be made again",
    "tandem_unreadable": "Objects without a good copy on either node",
    "tandem_conflicts": "Studies that name more than one patient",
    "tandem_uncommitted": "Entries of the log that wait for both nodes",
    "tandem_unpublished": "Entries of the log that readers don't see yet",
    "tandem_behind": "Entries that the other node lacks",
    "tandem_linked": "1 while the other node is heard",
    "tandem_etcd": "1 while etcd answers",
    "tandem_scrub_bad": "Bad copies that scrubbing has found since the start",
}


class Health:
    def __init__(
        self,
        store: Store,
        settings: HttpSettings,
        meter: Meter,
        queues: Callable[[], dict[str, int]],
        addresses: Sequence[str],
    ) -> None:
        """`queues()`: what waits, by what it waits for; `addresses`: where to listen if the settings don't say."""
        self._store, self._settings, self._queues = store, settings, queues
        self._addresses = [settings.bind] if settings.bind else addresses
        self._runner: web.AppRunner | None = None
        self._servers: list[asyncio.Server] = []
        self._status: dict[str, Any] = {}
        self._looked_at = float("-inf")
        self._registry = meter.registry
        self._gauges = {name: Gauge(name, about, registry=self._registry) for name, about in GAUGES.items()}
        store.measure(commit=meter.commit.observe, sync=meter.sync.observe)
        self._free = Gauge("tandem_volume_free_bytes", "Free space", ["path"], registry=self._registry)
        self._waiting = Gauge("tandem_waiting", "Jobs that wait", ["queue"], registry=self._registry)
        self._online = Gauge("tandem_volume_online", "1 while in service", ["path"], registry=self._registry)

    async def start(self) -> None:
        if not self._settings.port:
            return
        app = web.Application()
        app.router.add_get("/health/live", self._live)
        app.router.add_get("/health/ready", self._ready)
        app.router.add_get("/health/primary", self._primary)
        app.router.add_get("/health/standby", self._standby)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=KEEP_S)
        await self._runner.setup()
        loop, port = asyncio.get_running_loop(), self._settings.port
        for address in self._addresses:
            try:
                if address == "*":  # IPv4 and IPv6
                    server = await loop.create_server(self._connected, None, port, reuse_address=True)
                else:
                    server = await loop.create_server(self._connected, sock=_bound(address, port))
            except OSError as error:  # images are more important than looking at them
                log.error("http.not_listening", address=address, port=port, error=error.strerror)
                continue
            self._servers.append(server)

    def _connected(self) -> asyncio.BaseProtocol:
        """Descriptors are for images first."""
        assert self._runner is not None
        assert self._runner.server is not None
        transports = [one.transport for one in self._runner.server.connections]
        there = [one for one in transports if one is not None and not one.is_closing()]
        if len(there) >= CONNECTIONS_MAX:
            there[0].abort()
        return self._runner.server()

    async def stop(self) -> None:
        for server in self._servers:
            server.close()
        if self._runner:
            await self._runner.cleanup()

    async def _live(self, _: web.Request) -> web.Response:
        return _answer(True, "alive")

    async def _ready(self, _: web.Request) -> web.Response:
        store = self._store
        return _answer(store.may_serve or store.follows, self._mode())

    async def _primary(self, _: web.Request) -> web.Response:
        return _answer(self._store.may_serve, self._mode())

    async def _standby(self, request: web.Request) -> web.Response:
        try:
            most = int(request.query.get("lag", -1))
        except ValueError:
            return web.json_response({"error": "lag: a number of entries"}, status=400)
        lag = self._store.lag
        return _answer(self._store.follows and (most < 0 or lag <= most), self._mode(), lag=lag)

    def _mode(self) -> str:
        return self._store.mode

    async def _metrics(self, _: web.Request) -> web.Response:
        now = time.monotonic()
        if now - self._looked_at > STATUS_S:
            self._looked_at, self._status = now, self._store.status()
        status = self._status
        values = {
            "primary": self._store.may_serve,
            "in_sync": len(status["in_sync"]),
            "epoch": status["epoch"],
            "instances": status["instances"],
            "studies": status["studies"],
            "bytes": status["bytes"],
            "single_copy": status["single_copy"],
            "missing": status["healing"]["missing"],
            "unreadable": status["healing"]["unreadable"],
            "conflicts": status["conflicts"],
            "uncommitted": self._store.uncommitted,
            "unpublished": self._store.lag,
            "behind": status["catch_up"]["behind"],
            "linked": status["catch_up"]["linked"],
            "etcd": status["etcd"],
            "scrub_bad": status["scrub"]["bad"],
        }
        for name, value in values.items():
            self._gauges[f"tandem_{name}"].set(value)
        for queue, waiting in self._queues().items():
            self._waiting.labels(queue).set(waiting)
        for volume in status["nodes"][status["node"]]["volumes"]:
            self._online.labels(volume["path"]).set(volume["state"] in ("online", "slow", "full", "draining"))
            self._free.labels(volume["path"]).set(volume.get("free", 0))
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _bound(address: str, port: int) -> socket.socket:
    """Also to an address that isn't here yet, its cable being out. Raises OSError."""
    six = ":" in address
    sock = socket.socket(socket.AF_INET6 if six else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(*((socket.IPPROTO_IPV6, IPV6_FREEBIND, 1) if six else (socket.IPPROTO_IP, IP_FREEBIND, 1)))
        sock.bind((address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _answer(good: bool, mode: str, **more: int) -> web.Response:
    return web.json_response({"ok": good, "mode": mode, **more}, status=200 if good else 503)
