"""The HA process: agent, control socket, etcd, addresses and share on one event loop."""

import asyncio
import json
import os
import signal
import socket
import uuid
from typing import Any

import aiohttp
import structlog

from conf.notify import keep_alive, notify
from conf.settings import ClusterSettings, Settings
from ha.agent import Agent
from ha.etcd import HttpEtcd
from ha.fence import FenceFailed
from ha.gateway_link import SocketGatewayLink
from ha.site import NodeSite
from storage.control import boottime

log = structlog.get_logger()

WATCH_AGAIN_S = 0.5
HOUSEKEEPING_S = 3.0


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
    etcd = HttpEtcd(cluster.etcd, timeout_s=min(1.0, cluster.lease_ttl_s / 3))
    wake = asyncio.Event()
    gateway = SocketGatewayLink(settings.control_socket, wake)
    agent = Agent(
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
        vips=cluster.vips,
        wake=wake,
    )
    log.info("ha.started", node=settings.node.name, pid=os.getpid())
    linked = asyncio.create_task(gateway.run())
    running = [
        asyncio.create_task(coroutine)
        for coroutine in (agent.run(), _watch(etcd, agent), _keep_etcd_leader_elsewhere(cluster, site))
    ]
    fed = asyncio.create_task(keep_alive())
    notify("READY=1")
    for task in (linked, *running):
        task.add_done_callback(lambda _: stop.set())
    await stop.wait()
    failed = [repr(task.exception()) for task in (linked, *running) if task.done() and not task.cancelled()]
    notify("STOPPING=1")
    for task in (fed, *running):
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await site.leave()
    if failed:
        log.error("ha.failed", error=failed[0])
    else:
        await agent.resign()
    linked.cancel()
    await etcd.close()
    return 1 if failed else 0


async def _watch(etcd: HttpEtcd, agent: Agent) -> None:
    """A change in etcd is looked at at once; the agent's own rhythm is the safety net."""
    while True:
        async for _ in etcd.watch(agent.prefix):
            await agent.look_now()
        await asyncio.sleep(WATCH_AGAIN_S)


async def _keep_etcd_leader_elsewhere(cluster: ClusterSettings, site: NodeSite) -> None:
    """While this node is the primary, etcd's own leader had better be another member.

    If the node dies, the survivors then don't lose time on an election before the lease can run out.
    """
    own = next((endpoint for endpoint in cluster.etcd if cluster.address in endpoint), None)
    if own is None:
        return
    timeout = aiohttp.ClientTimeout(total=2.0)
    async with aiohttp.ClientSession(own, timeout=timeout) as session:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            if not site.up:
                continue
            try:
                await _move_leader(session, cluster)
            except (aiohttp.ClientError, TimeoutError, OSError, KeyError, json.JSONDecodeError):
                continue


async def _move_leader(session: aiohttp.ClientSession, cluster: ClusterSettings) -> None:
    async def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with session.post(path, json=body) as response:
            answer: dict[str, Any] = await response.json(content_type=None)
            return answer

    status = await post("/v3/maintenance/status", {})
    own = status["header"]["member_id"]
    if status.get("leader") != own:
        return
    members = (await post("/v3/cluster/member/list", {}))["members"]
    others = [member for member in members if member["ID"] != own]
    others.sort(key=lambda member: member.get("name") == cluster.peer)  # the witness first
    if others:
        await post("/v3/maintenance/transfer-leadership", {"targetID": others[0]["ID"]})
        log.info("etcd.leader_moved", to=others[0].get("name"))
