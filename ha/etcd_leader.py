"""etcd's own leadership, kept away from the node that serves."""

import asyncio
import contextlib
from urllib.parse import urlsplit

import structlog

from conf.settings import ClusterSettings
from conf.tls import MutualTls
from ha.etcd import EtcdError, HttpEtcd
from ha.reach.site import NodeSite

log = structlog.get_logger()

MEMBER_TIMEOUT_S = 2.0
HOUSEKEEPING_S = 3.0


async def keep_etcd_leader_elsewhere(cluster: ClusterSettings, site: NodeSite, tls: MutualTls | None) -> None:
    """While this node is the primary, etcd's own leader had better be another member.

    If the node dies, the survivors then don't lose time on an election before the lease can run out.
    """
    addresses = {route.address for route in cluster.routes}
    own = next((endpoint for endpoint in cluster.etcd if urlsplit(endpoint).hostname in addresses), None)
    if own is None:
        return
    member = HttpEtcd((own,), MEMBER_TIMEOUT_S, tls)
    try:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            if site.up:
                with contextlib.suppress(EtcdError, KeyError):
                    await _move_leader(member, cluster)
    finally:
        await member.close()


async def _move_leader(member: HttpEtcd, cluster: ClusterSettings) -> None:
    status = await member.call("/v3/maintenance/status")
    own = status["header"]["member_id"]
    if status.get("leader") != own:
        return
    members = (await member.call("/v3/cluster/member/list"))["members"]
    others = [other for other in members if other["ID"] != own]
    others.sort(key=lambda other: other.get("name") == cluster.peer)  # the witness first
    if others:
        await member.call("/v3/maintenance/transfer-leadership", targetID=others[0]["ID"])
        log.info("etcd.leader_moved", to=others[0].get("name"))
