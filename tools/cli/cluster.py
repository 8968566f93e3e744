"""`tandem switchover|failover|pause|resume|history|why|risk`: who serves, and what people may want to do about it."""

import asyncio
import json
import math
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import msgspec

from conf.settings import ClusterSettings, Settings
from conf.tls import CertificatesBad, MutualTls
from ha.decide import State, View, conditions
from ha.etcd import Compare, DeleteKey, EtcdError, HttpEtcd, KeyValue, PutKey
from ha.records import Records, StateValue, read
from storage.control import NEVER, Member, Report, boottime
from storage.control_client import ask, report
from tools.cli.exits import EXIT_AWAY, EXIT_CONFIG, EXIT_FOUND
from tools.cli.options import Failure, config_option, json_option, settings_of, sure, yes_option
from tools.cli.say import say

T = TypeVar("T")
SWITCHOVER_S: Final = 30
POLL_S: Final = 0.05
ETCD_TIMEOUT_S: Final = 3.0
ETCD_PATIENCE_S: Final = 10.0  # its members elect a leader anew after one of them has gone


class Cluster:
    """What etcd says of a pair."""

    def __init__(self, etcd: HttpEtcd, prefix: str, keys: dict[str, KeyValue]) -> None:
        self.etcd, self.prefix = etcd, prefix
        self.records = read(keys, Records(), boottime())
        self.leader = self.records.leader.node if self.records.leader else ""
        self.state = self.records.state
        self.present = set(self.records.members)
        self.history = [json.loads(kv.value) for key, kv in sorted(keys.items()) if key.startswith("history/")]

    @property
    def in_sync(self) -> list[str]:
        return [member.node for member in self.state.in_sync] if self.state else []

    def view(self, settings: Settings, gateway: Report | None) -> View:
        """As the agent of this node sees it, for `ha.decide.conditions`."""
        cluster, node, now = settings.cluster, settings.node.name, boottime()
        if cluster is None:
            raise ValueError("no [cluster] section")
        mine, other = self.records.members.get(node), self.records.members.get(cluster.peer)
        return View(
            node=node,
            peer=cluster.peer,
            now=now,
            ttl_s=cluster.lease_ttl_s,
            started_at=now,
            gateway_grace_s=cluster.gateway_grace_s,
            looked=True,
            etcd_ok=True,
            state=self.state,
            leader=self.records.leader,
            leader_absent_since=None,
            lease=0,
            lease_deadline=NEVER,
            gateway=gateway,
            gateway_lost_at=None,
            paused=self.records.paused,
            peer_present=other is not None,
            trouble=mine.trouble if mine else "",
            maintained=node in self.records.maintained,
        )


async def look(etcd: HttpEtcd, name: str) -> Cluster:
    prefix = f"/tandem/{name}/"
    return Cluster(etcd, prefix, {kv.key.removeprefix(prefix): kv for kv in await etcd.get_prefix(prefix)})


UNSEEN_EPOCHS: Final = 1 << 20


def with_etcd(config: Path | None, work: Callable[[Settings, ClusterSettings, HttpEtcd], Awaitable[T]]) -> T:
    """Run `work` with a connection to the cluster's etcd."""
    settings = settings_of(config)
    cluster = settings.cluster
    if cluster is None:
        raise Failure("this node runs alone: the settings have no [cluster] section", EXIT_CONFIG)

    async def main() -> T:
        try:
            tls = MutualTls(cluster.tls) if cluster.tls else None
            etcd = HttpEtcd(cluster.etcd, ETCD_TIMEOUT_S, tls, ETCD_PATIENCE_S)
        except CertificatesBad as error:
            raise Failure(f"{error}; may you read them?", EXIT_CONFIG) from None
        try:
            return await work(settings, cluster, etcd)
        finally:
            await etcd.close()

    try:
        return asyncio.run(main())
    except EtcdError as error:
        raise Failure(f"etcd doesn't answer: {error}", EXIT_AWAY) from None


# -- switchover --------------------------------------------------------------------------------------------------------


@click.command()
@config_option
@click.option("--to", help="Node that is to become primary; default: the other one.")
@click.option("--at", type=click.DateTime(["%H:%M", "%Y-%m-%dT%H:%M"]), help="Wait until then.")
@json_option
def switchover(config: Path | None, to: str | None, at: datetime | None, as_json: bool) -> None:
    """Let the other node serve. Requests under way are ended first. Exit 4 if it can't be done now."""
    if at is not None:
        time.sleep(_seconds_until(at))
    result = with_etcd(config, lambda settings, cluster, etcd: switch(settings, cluster, etcd, to))
    lacks = f"; {result['missing']} objects are still being copied to it" if result["missing"] else ""
    say(result, as_json, f"node {result['to']} is primary after {result['seconds']:.1f} s{lacks}")


def _seconds_until(at: datetime) -> float:
    now = datetime.now()
    if at.year == 1900:  # only a time of day was given
        at = at.replace(year=now.year, month=now.month, day=now.day)
        if at < now:
            at += timedelta(days=1)
    return max(0.0, (at - now).total_seconds())


def _missing_on(node: str, settings: Settings) -> tuple[int, int]:
    """How many copies a node lacks, of how many, as far as this one's gateway knows."""
    try:
        status = own_status(settings)
    except Failure:
        return 0, 0
    own = node == status["node"]
    missing = status["healing"]["missing"] if own else status["nodes"].get(node, {}).get("missing", 0)
    return int(missing), int(status["instances"])


async def switch(settings: Settings, cluster: ClusterSettings, etcd: HttpEtcd, to: str | None) -> dict[str, Any]:
    """Ask for a switchover and wait until it has happened. Raises Failure."""
    node, found = settings.node.name, await look(etcd, cluster.name)
    if not found.leader:
        raise Failure("there is no primary now; `tandem why` says why", EXIT_FOUND)
    other = cluster.peer if found.leader == node else node
    target = to or other
    if target not in (node, cluster.peer):
        raise Failure(f"{target} is no node of this pair ({node}, {cluster.peer})", EXIT_CONFIG)
    if target == found.leader:
        return {"to": target, "from": target, "seconds": 0.0, "missing": 0}
    if target not in found.in_sync:
        raise Failure(f"node {target} isn't in sync; `tandem status` shows how far it is", EXIT_FOUND)
    if target not in found.present:
        raise Failure(f"the HA agent of node {target} isn't there; is `tandem-ha` running on it?", EXIT_FOUND)
    missing, instances = await asyncio.to_thread(_missing_on, target, settings)
    if 2 * missing > instances:
        raise Failure(
            f"node {target} lacks {missing} of {instances} objects, which are being copied to it: wait until it has "
            "most of them (`tandem status`)",
            EXIT_FOUND,
        )
    patience_s = SWITCHOVER_S + math.ceil(sum(one.stop_s for one in cluster.follow))
    lease = await etcd.grant(patience_s)
    await etcd.txn((), (PutKey(f"{found.prefix}switchover", target, lease),))
    started, before = time.monotonic(), found.leader
    while time.monotonic() - started < patience_s:
        await asyncio.sleep(POLL_S)
        found = await look(etcd, cluster.name)
        if found.leader == target:
            seconds = round(time.monotonic() - started, 2)
            return {"to": target, "from": before, "seconds": seconds, "missing": missing}
    raise Failure(f"node {target} didn't take over within {patience_s} s; `tandem why` on it says why", EXIT_FOUND)


@click.command()
@config_option
@click.option("--force", is_flag=True, help="Needed: it may lose what only the other node holds.")
@yes_option
@json_option
def failover(config: Path | None, force: bool, yes: bool, as_json: bool) -> None:
    """Make this node primary where nothing else does: the other one is gone for good, or etcd was lost or restored.

    Says first what would be lost, and refuses while the other node is alive and knows more. In the end there is a pair
    that can be made whole again.
    """
    if not force:
        raise Failure("give --force; for a planned change there is `tandem switchover`", EXIT_CONFIG)

    async def check(settings: Settings, _: ClusterSettings, etcd: HttpEtcd) -> tuple[Cluster, Report, dict[str, Any]]:
        assert settings.cluster is not None
        return await look(etcd, settings.cluster.name), own_report(settings), own_status(settings)

    async def force_in(settings: Settings, cluster: ClusterSettings, etcd: HttpEtcd) -> bool:
        now, mine, _ = await check(settings, cluster, etcd)
        before = found.state.revision if found.state else 0
        if now.leader or (now.state.revision if now.state else 0) != before:
            return False  # it isn't any more what was shown
        if refusal(now, mine, settings.node.name):
            return False
        value = forced(now.state, mine, settings.node.name)
        key = f"{found.prefix}state"
        free = Compare(f"{found.prefix}leader", "create", 0)
        put = PutKey(key, msgspec.json.encode(value).decode())
        return await etcd.txn((free, Compare(key, "mod", before)), (put,))

    found, mine, own = with_etcd(config, check)
    node = own["node"]
    if why := refusal(found, mine, node):
        raise Failure(why, EXIT_FOUND)
    click.echo(losses(found, mine, own), err=True)
    sure("Serve from this node?", yes)
    if not with_etcd(config, force_in):
        raise Failure("the state changed meanwhile; look again", EXIT_FOUND)
    later = "before the other node starts again: `tandem rebuild-index --from peer` on it"
    say({"forced": node, "later": later}, as_json, f"node {node} takes over now; {later}")


def refusal(found: Cluster, mine: Report, node: str) -> str:
    """Why a node isn't made primary by force, "" if it may be."""
    other = mine.peer.node if mine.peer else "the other node"
    if found.leader:
        return f"node {found.leader} is primary; `tandem switchover` is what you want"
    if mine.linked and mine.peer_leads:
        return f"node {other} is alive and leads, though etcd doesn't say so; what it holds alone would be lost"
    if mine.linked and mine.foreign:
        return f"node {other} is alive and holds another log; stop it first if its data are to go"
    if mine.linked and mine.peer_last is not None and mine.last < mine.peer_last:
        return f"node {other} is alive and its log is longer: run this there"
    if mine.linked and mine.peer_whole and not mine.whole:
        return f"node {other} is alive and its copy is complete: run this there"
    return ""


def forced(state: State | None, mine: Report, node: str) -> StateValue:
    """The state in which only this node, as it is, is in sync; in an epoch above all that either node has promised, and
    far above what a node that isn't heard may have led in: two logs never use the same epoch."""
    known = state.epoch if state else 0
    epoch = max(known, mine.promised, mine.peer_promised if mine.linked else 0) + (1 if mine.linked else UNSEEN_EPOCHS)
    cluster_id = mine.cluster_id or (state.cluster_id if state else "") or str(uuid.uuid4())
    me = Member(node, mine.store_id, mine.incarnation)
    lineage = mine.lineage or str(uuid.uuid4())
    return StateValue(cluster_id, epoch, node, (me,), f"forced by {node} {uuid.uuid4()}", lineage)


def losses(found: Cluster, mine: Report, own: dict[str, Any]) -> str:
    """What would be lost, as far as can be known here."""
    node, state = own["node"], found.state
    lines = []
    if state is None:
        lines.append("etcd knows nothing of this cluster: it was lost. Its state is made anew from this node.")
    elif state.epoch < mine.promised:
        lines.append(f"etcd knows epoch {state.epoch}, this node {mine.promised}: it was restored from a backup.")
    others = [one for one in found.in_sync if one != node]
    if state is not None and node not in found.in_sync:
        last = found.history[-1] if found.history else {}
        lines.append(
            f"In sync is only {', '.join(others) or 'nobody'}: what it stored alone since epoch {state.epoch} "
            f"({_when(last.get('at'))}) isn't here, and how much that is only it knows."
        )
    elif mine.linked:
        lines.append("The other node is linked, and holds nothing that isn't here.")
    else:
        lines.append("Everything that was acknowledged while both nodes were in sync is in this node's log.")
    missing = own["healing"]["missing"]
    lacks = f"; of {missing} it has no copy: they are lost if no other one turns up" if missing else ""
    lines.append(f"This node holds {own['instances']} instances{lacks}.")
    return "\n".join(lines)


def own_report(settings: Settings) -> Report:
    try:
        return report(settings.control_socket)
    except OSError as error:
        raise Failure(f"the gateway of node {settings.node.name} isn't running ({error.strerror})", EXIT_AWAY) from None


def own_status(settings: Settings) -> dict[str, Any]:
    try:
        return ask(settings.control_socket)
    except OSError as error:
        raise Failure(f"the gateway of node {settings.node.name} isn't running ({error.strerror})", EXIT_AWAY) from None


# -- pause -------------------------------------------------------------------------------------------------------------


@click.command()
@config_option
@json_option
def pause(config: Path | None, as_json: bool) -> None:
    """No takeover by itself until `tandem resume`: for work on network or etcd. The primary goes on."""

    async def work(_: Settings, cluster: ClusterSettings, etcd: HttpEtcd) -> None:
        await etcd.txn((), (PutKey(f"/tandem/{cluster.name}/pause", datetime.now().isoformat(timespec="seconds")),))

    with_etcd(config, work)
    say({"paused": True}, as_json, "paused: if the primary fails now, nobody takes over")


@click.command()
@config_option
@json_option
def resume(config: Path | None, as_json: bool) -> None:
    """Take over by itself again."""

    async def work(_: Settings, cluster: ClusterSettings, etcd: HttpEtcd) -> None:
        await etcd.txn((), (DeleteKey(f"/tandem/{cluster.name}/pause"),))

    with_etcd(config, work)
    say({"paused": False}, as_json, "resumed")


# -- looking -----------------------------------------------------------------------------------------------------------


@click.command()
@config_option
@json_option
def history(config: Path | None, as_json: bool) -> None:
    """Each change of the primary: when, why, and how long nobody held the lease."""

    async def work(_: Settings, cluster: ClusterSettings, etcd: HttpEtcd) -> list[dict[str, Any]]:
        return (await look(etcd, cluster.name)).history

    rows = with_etcd(config, work)
    lines = [
        f"epoch {row['epoch']}  {_when(row.get('at'))}  {row.get('before') or '-'} -> {row['primary']}  {row['by']}"
        f"  without a leader {row.get('leaderless_s', 0)} s{_parts(row)}"
        for row in rows
    ]
    say({"history": rows}, as_json, "\n".join(lines) or "no primary yet")


def _parts(row: dict[str, Any]) -> str:
    """How long each part of a takeover took: the other node's silence noticed, its lease and promise waited out, rolled
    forward, share and address brought up, and from then to the first image acknowledged."""
    parts = [f"{name.removesuffix('_s').replace('_', ' ')} {value} s" for name, value in row.get("parts", {}).items()]
    return f"  ({', '.join(parts)})" if parts else ""


def _when(at: float | None) -> str:
    return datetime.fromtimestamp(at).isoformat(" ", "seconds") if at else "?"


@click.command()
@config_option
@json_option
def why(config: Path | None, as_json: bool) -> None:
    """Could this node take over if the primary ended now, and why did the last takeover happen? Exit 4 if not."""

    async def work(
        settings: Settings, cluster: ClusterSettings, etcd: HttpEtcd
    ) -> tuple[list[tuple[str, bool, str]], dict[str, Any]]:
        found, gateway = await look(etcd, cluster.name), own_report(settings)
        return reasons(found, settings, gateway), found.history[-1] if found.history else {}

    found, last = with_etcd(config, work)
    blocked = [name for name, good, _ in found if not good]
    text = "\n".join(f"{'ok     ' if good else 'BLOCKS '} {name}: {says}" for name, good, says in found)
    rows = [{"condition": name, "ok": good, "says": says} for name, good, says in found]
    if last:
        text += f"\nlast change {_when(last.get('at'))}: {told(last)}"
    say({"may_take_over": not blocked, "conditions": rows, "last": last}, as_json, text)
    sys.exit(EXIT_FOUND if blocked else 0)


REASONS: Final = {
    "switchover": "node {before} handed over to {primary} because somebody asked for it",
    "takeover": "node {primary} took over: {before} had given its lease back, or let it run out",
    "again": "node {primary} lost its lease for a moment and leads again",
    "restart": "the gateway of node {primary} was restarted and leads again",
    "first": "node {primary} is the first primary of this cluster",
}


def told(row: dict[str, Any]) -> str:
    """Why a change of the primary happened, in words."""
    by = row["by"] if row.get("before") else "first"
    return REASONS.get(by, by).format(**row)


def reasons(found: Cluster, settings: Settings, gateway: Report) -> list[tuple[str, bool, str]]:
    """What `decide` asks before this node takes a free lease: (condition, whether it holds, in words)."""
    node, leader = settings.node.name, found.leader
    held = "held by this node" if leader == node else f"held by {leader}; free when that ends" if leader else "free"
    if found.state is None:
        why = "etcd knows nothing of this cluster; " + (
            "it was lost: `tandem failover --force` makes it anew from this node" if gateway.cluster_id else "it is new"
        )
        return [("lease", True, held), ("state", False, why)]
    rows = conditions(found.view(settings, gateway), gateway, found.state)
    return [("lease", True, held), *((one.name, one.holds or leader == node, one.says) for one in rows)]


@click.command()
@config_option
@json_option
def risk(config: Path | None, as_json: bool) -> None:
    """What would be lost if this node died now. Exit 4 if anything would."""
    own = own_status(settings_of(config))
    since = own.get("single_copy_since")
    result = {
        "single_copy": own["single_copy"],
        "files_single_copy": own["files"]["single_copy"],
        "oldest_s": round(time.time() - since) if since else None,
        "missing_here": own["healing"]["missing"],
        "unreadable": own["healing"]["unreadable"],
        "in_sync": own["in_sync"],
    }
    lines = [
        f"{own['single_copy']} objects have their only copy here, as far as is known"
        + (f", the oldest since {_when(since)}" if since else "")
    ]
    if own["files"]["single_copy"]:
        lines.append(f"{own['files']['single_copy']} files of the share are on one node only")
    if own["healing"]["missing"]:
        lines.append(f"{own['healing']['missing']} copies of this node are being made again")
    if own["healing"]["unreadable"]:
        lines.append(f"{own['healing']['unreadable']} objects have no good copy on either node")
    say(result, as_json, "\n".join(lines))
    at_risk = own["single_copy"] or own["files"]["single_copy"] or own["healing"]["unreadable"]
    sys.exit(EXIT_FOUND if at_risk else 0)


COMMANDS: tuple[click.Command, ...] = (switchover, failover, pause, resume, history, why, risk)
