"""The HA process: agent, control socket, etcd, addresses and share on one event loop."""

import asyncio
import os
import signal
import socket
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from conf.notify import keep_alive, notify
from conf.settings import ClusterSettings, Settings
from conf.tls import MutualTls
from ha.agent import Agent
from ha.etcd import HttpEtcd
from ha.etcd_leader import keep_etcd_leader_elsewhere
from ha.gateway_link import SocketGatewayLink
from ha.reach.fence import FenceFailed
from ha.reach.share_users import ShareUsers
from ha.reach.site import NodeSite
from ha.tell.sinks import Alerting
from storage.control import Clients, boottime

log = structlog.get_logger()

WATCH_AGAIN_S = 0.5
ALERTS_AGAIN_S = 60.0
CLIENTS_S = 1.0


def run(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code."""
    if settings.cluster is None:
        raise ValueError("no [cluster] section")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as only:
        try:
            only.bind(f"\0tandem-ha-{settings.node.name}-{settings.control_socket}")
        except OSError:
            log.error("ha.already_running", node=settings.node.name)
            return 1
        return asyncio.run(_main(settings, settings.cluster))


async def _main(settings: Settings, cluster: ClusterSettings) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    site = NodeSite(settings)
    try:
        site.prepare()
    except FenceFailed as error:
        log.error("ha.no_fence", error=str(error))
        return 1
    tls = MutualTls(cluster.tls) if cluster.tls else None
    etcd = HttpEtcd(cluster.etcd, min(1.0, cluster.lease_ttl_s / 3), tls)
    wake = asyncio.Event()
    gateway = SocketGatewayLink(settings.control_socket, wake)
    site.on_left = lambda clients: gateway.send(Clients(clients))  # at once, for whoever takes over now
    gateway.on_clients = lambda clients: site.note_clients(clients.connections)
    agent = _new_agent(settings, cluster, etcd, gateway, site, wake)
    log.info("ha.started", node=settings.node.name, pid=os.getpid())
    linked, deciding = asyncio.create_task(gateway.run()), asyncio.create_task(agent.run())
    beside = [
        asyncio.create_task(_beside(name, coroutine))
        for name, coroutine in (
            *([("share users", ShareUsers(settings).run())] if settings.share.enabled else []),
            ("watch", _watch(etcd, agent)),
            ("etcd leader", keep_etcd_leader_elsewhere(cluster, site, tls)),
            ("clients", _tell_clients(site, gateway)),
            ("alerts", _alert(settings, agent)),
            ("systemd", keep_alive()),
        )
    ]
    notify("READY=1")
    for task in (linked, deciding):
        task.add_done_callback(lambda _: stop.set())
    await stop.wait()
    failed = [repr(task.exception()) for task in (linked, deciding) if task.done() and not task.cancelled()]
    notify("STOPPING=1")
    for task in (deciding, *beside):
        task.cancel()
    await asyncio.gather(deciding, *beside, return_exceptions=True)
    await site.stop_following()
    await site.leave()
    await site.leave_reads()
    if failed:
        log.error("ha.failed", error=failed[0])
    else:
        await agent.resign()
    linked.cancel()
    await site.close()
    await etcd.close()
    return 1 if failed else 0


async def _beside(name: str, work: Coroutine[Any, Any, None]) -> None:
    """What isn't needed to serve doesn't end the service when it fails."""
    try:
        await work
    except Exception:
        log.exception("ha.part_failed", part=name)


def _new_agent(
    settings: Settings,
    cluster: ClusterSettings,
    etcd: HttpEtcd,
    gateway: SocketGatewayLink,
    site: NodeSite,
    wake: asyncio.Event,
) -> Agent:
    return Agent(
        node=settings.node.name,
        peer=cluster.peer,
        cluster=cluster.name,
        ttl_s=cluster.lease_ttl_s,
        gateway_grace_s=cluster.gateway_grace_s,
        etcd=etcd,
        gateway=gateway,
        site=site,
        clock=boottime,
        new_id=lambda: str(uuid.uuid4()),
        gateway_starts=cluster.gateway_starts,
        reached=_crash_points(settings),
        wake=wake,
    )


def _crash_points(settings: Settings) -> Callable[[str], None]:
    """In a lab: die at the point that a file names, once."""
    ordered = settings.node.run_dir / f"{settings.node.name}-ha.crash"

    def reached(name: str) -> None:
        if os.environ.get("TANDEM_FAULTS") and ordered.exists() and ordered.read_text() == name:
            ordered.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    return reached


async def _alert(settings: Settings, agent: Agent) -> None:
    """Whatever goes wrong with telling people must not touch the service."""
    while settings.alerts.any:
        try:
            await Alerting(settings, agent).run()
        except Exception:
            log.exception("alerts.failed")
        await asyncio.sleep(ALERTS_AGAIN_S)


async def _watch(etcd: HttpEtcd, agent: Agent) -> None:
    """A change in etcd is looked at at once; the agent's own rhythm is the safety net."""
    while True:
        async for _ in etcd.watch(agent.prefix):
            await agent.look_now()
        await asyncio.sleep(WATCH_AGAIN_S)


async def _tell_clients(site: NodeSite, gateway: SocketGatewayLink) -> None:
    """The other node is to know who is connected here, and to make them connect anew should it take over."""
    while True:
        if site.vips:
            gateway.send(Clients(await asyncio.to_thread(site.clients)))
        await asyncio.sleep(CLIENTS_S)
