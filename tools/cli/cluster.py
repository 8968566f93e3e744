"""`tandem switchover|failover|pause|resume|history|why|risk`: who serves, and what people may want to do about it."""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import msgspec

from conf.settings import ClusterSettings, Settings
from conf.tls import CertificatesBad, MutualTls
from ha.etcd import Compare, DeleteKey, EtcdError, HttpEtcd, PutKey
from ha.records import StateValue
from storage.control import Member
from tools.cli.client import ask
from tools.cli.operate import json_option
from tools.cli.options import EXIT_CONFIG, Failure, config_option, settings_of

T = TypeVar("T")
EXIT_AWAY: Final = 3
EXIT_BLOCKED: Final = 4
SWITCHOVER_S: Final = 30
POLL_S: Final = 0.05
ETCD_TIMEOUT_S: Final = 3.0


class Cluster:
    """What etcd says of a pair."""

    def __init__(self, etcd: HttpEtcd, prefix: str, keys: dict[str, Any]) -> None:
        self.etcd, self.prefix = etcd, prefix
        self.leader = keys["leader"].value if "leader" in keys else ""
        self.state = msgspec.json.decode(keys["state"].value, type=StateValue) if "state" in keys else None
        self.revision = keys["state"].mod_revision if "state" in keys else 0
        self.paused = "pause" in keys
        self.switchover = keys["switchover"].value if "switchover" in keys else ""
        self.maintained = {key.removeprefix("maintenance/") for key in keys if key.startswith("maintenance/")}
        self.present = {key.removeprefix("members/") for key in keys if key.startswith("members/")}
        self.history = [json.loads(kv.value) for key, kv in sorted(keys.items()) if key.startswith("history/")]

    @property
    def in_sync(self) -> list[str]:
        return [member.node for member in self.state.in_sync] if self.state else []


async def look(etcd: HttpEtcd, name: str) -> Cluster:
    prefix = f"/tandem/{name}/"
    return Cluster(etcd, prefix, {kv.key.removeprefix(prefix): kv for kv in await etcd.get_prefix(prefix)})


def with_etcd(config: Path | None, work: Callable[[Settings, ClusterSettings, HttpEtcd], Awaitable[T]]) -> T:
    """Run `work` with a connection to the cluster's etcd."""
    settings = settings_of(config)
    cluster = settings.cluster
    if cluster is None:
        raise Failure("this node runs alone: the settings have no [cluster] section", EXIT_CONFIG)

    async def main() -> T:
        try:
            etcd = HttpEtcd(cluster.etcd, ETCD_TIMEOUT_S, MutualTls(cluster.tls) if cluster.tls else None)
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


def echo(result: dict[str, Any], as_json: bool, text: str) -> None:
    click.echo(json.dumps(result) if as_json else text)


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
    result = with_etcd(config, lambda settings, cluster, etcd: switch(cluster, settings.node.name, etcd, to))
    echo(result, as_json, f"node {result['to']} is primary after {result['seconds']:.1f} s")


def _seconds_until(at: datetime) -> float:
    now = datetime.now()
    if at.year == 1900:  # only a time of day was given
        at = at.replace(year=now.year, month=now.month, day=now.day)
        if at < now:
            at += timedelta(days=1)
    return max(0.0, (at - now).total_seconds())


async def switch(cluster: ClusterSettings, node: str, etcd: HttpEtcd, to: str | None) -> dict[str, Any]:
    """Ask for a switchover and wait until it has happened. Raises Failure."""
    found = await look(etcd, cluster.name)
    if not found.leader:
        raise Failure("there is no primary now; `tandem why` says why", EXIT_BLOCKED)
    other = cluster.peer if found.leader == node else node
    target = to or other
    if target not in (node, cluster.peer):
        raise Failure(f"{target} is no node of this pair ({node}, {cluster.peer})", EXIT_CONFIG)
    if target == found.leader:
        return {"to": target, "from": target, "seconds": 0.0}
    if target not in found.in_sync:
        raise Failure(f"node {target} isn't in sync; `tandem status` shows how far it is", EXIT_BLOCKED)
    if target not in found.present:
        raise Failure(f"the HA agent of node {target} isn't there; is `tandem-ha` running on it?", EXIT_BLOCKED)
    lease = await etcd.grant(SWITCHOVER_S)
    await etcd.txn((), (PutKey(f"{found.prefix}switchover", target, lease),))
    started, before = time.monotonic(), found.leader
    while time.monotonic() - started < SWITCHOVER_S:
        await asyncio.sleep(POLL_S)
        found = await look(etcd, cluster.name)
        if found.leader == target:
            return {"to": target, "from": before, "seconds": round(time.monotonic() - started, 2)}
    raise Failure(f"node {target} didn't take over within {SWITCHOVER_S} s; `tandem why` on it says why", EXIT_BLOCKED)


@click.command()
@config_option
@click.option("--force", is_flag=True, required=True, help="It may lose what only the other node holds.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@json_option
def failover(config: Path | None, force: bool, yes: bool, as_json: bool) -> None:
    """Make this node primary although it isn't in sync. Only when the other node is gone for good."""

    async def check(settings: Settings, cluster: ClusterSettings, etcd: HttpEtcd) -> tuple[Cluster, dict[str, Any]]:
        return await look(etcd, cluster.name), own_status(settings)

    async def force_in(settings: Settings, cluster: ClusterSettings, etcd: HttpEtcd) -> bool:
        now, own = await check(settings, cluster, etcd)
        if now.state is None or now.leader or now.revision != found.revision:
            return False  # it isn't any more what was shown
        me = Member(settings.node.name, own["store_id"], own["incarnation"])
        node = settings.node.name
        value = msgspec.structs.replace(now.state, primary=node, in_sync=(me,), nonce=f"forced by {node}")
        key = f"{found.prefix}state"
        free = Compare(f"{found.prefix}leader", "create", 0)
        put = PutKey(key, msgspec.json.encode(value).decode())
        return await etcd.txn((free, Compare(key, "mod", now.revision)), (put,))

    found, own = with_etcd(config, check)
    node = own["node"]
    if found.leader:
        raise Failure(f"node {found.leader} is primary; `tandem switchover` is what you want", EXIT_BLOCKED)
    if node in found.in_sync:
        raise Failure(
            f"node {node} is in sync and takes over by itself; `tandem why` says what it waits for", EXIT_BLOCKED
        )
    epoch = found.state.epoch if found.state else 0
    last = found.history[-1] if found.history else {}
    click.echo(
        f"In sync is only {', '.join(found.in_sync) or 'nobody'}: what it stored alone since epoch {epoch} "
        f"({_when(last.get('at'))}) isn't here and would be quarantined there when it comes back. This node holds "
        f"{own['instances']} instances, {own['catch_up']['missing']} of them without a copy here.",
        err=True,
    )
    if not yes and not click.confirm("Lose that and serve from this node?", err=True):
        raise Failure("nothing was changed", 1)
    if not with_etcd(config, force_in):
        raise Failure("the state changed meanwhile; look again", EXIT_BLOCKED)
    later = "before the other node starts again: `tandem rebuild-index --from peer` on it"
    echo({"forced": node, "later": later}, as_json, f"node {node} takes over now; {later}")


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
    echo({"paused": True}, as_json, "paused: if the primary fails now, nobody takes over")


@click.command()
@config_option
@json_option
def resume(config: Path | None, as_json: bool) -> None:
    """Take over by itself again."""

    async def work(_: Settings, cluster: ClusterSettings, etcd: HttpEtcd) -> None:
        await etcd.txn((), (DeleteKey(f"/tandem/{cluster.name}/pause"),))

    with_etcd(config, work)
    echo({"paused": False}, as_json, "resumed")


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
    echo({"history": rows}, as_json, "\n".join(lines) or "no primary yet")


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
        found, own = await look(etcd, cluster.name), own_status(settings)
        return _conditions(found, own, settings.node.name), found.history[-1] if found.history else {}

    conditions, last = with_etcd(config, work)
    blocked = [name for name, good, _ in conditions if not good]
    text = "\n".join(f"{'ok     ' if good else 'BLOCKS '} {name}: {says}" for name, good, says in conditions)
    rows = [{"condition": name, "ok": good, "says": says} for name, good, says in conditions]
    if last:
        text += f"\nlast change {_when(last.get('at'))}: {REASONS.get(last['by'], last['by']).format(**last)}"
    echo({"may_take_over": not blocked, "conditions": rows, "last": last}, as_json, text)
    sys.exit(EXIT_BLOCKED if blocked else 0)


REASONS: Final = {
    "switchover": "node {before} handed over to {primary} because somebody asked for it",
    "takeover": "node {primary} took over: {before} had given its lease back, or let it run out",
    "again": "node {primary} lost its lease for a moment and leads again",
    "restart": "the gateway of node {primary} was restarted and leads again",
}


def _conditions(found: Cluster, own: dict[str, Any], node: str) -> list[tuple[str, bool, str]]:
    member = next((one for one in found.state.in_sync if one.node == node), None) if found.state else None
    usable = [row for row in own["nodes"][node]["volumes"] if row["state"] in ("online", "slow", "full", "draining")]
    leader, maintained = found.leader, node in found.maintained
    held = "held by this node" if leader == node else f"held by {leader}; free when that ends" if leader else "free"
    return [
        ("lease", True, held),
        ("in sync", member is not None, ", ".join(found.in_sync) or "nobody"),
        ("same store", member is None or member.store_id == own["store_id"], own["store_id"]),
        ("complete copy", bool(own["whole"]), "yes" if own["whole"] else "still catching up"),
        ("a disk", bool(usable), f"{len(usable)} in service"),
        ("no trouble", not own["trouble"], own["trouble"] or "none"),
        ("no maintenance", not maintained, "`tandem maintenance off` ends it" if maintained else "none"),
        ("not paused", not found.paused or leader == node, "`tandem resume` ends it" if found.paused else "no pause"),
    ]


@click.command()
@config_option
@json_option
def risk(config: Path | None, as_json: bool) -> None:
    """What would be lost if this node died now. Exit 4 if anything would."""
    own = own_status(settings_of(config))
    since = own.get("single_copy_since")
    result = {
        "single_copy": own["single_copy"],
        "oldest_s": round(time.time() - since) if since else None,
        "missing_here": own["healing"]["missing"],
        "unreadable": own["healing"]["unreadable"],
        "in_sync": own["in_sync"],
    }
    lines = [
        f"{own['single_copy']} objects have their only copy here"
        + (f", the oldest since {_when(since)}" if since else "")
    ]
    if own["healing"]["missing"]:
        lines.append(f"{own['healing']['missing']} copies of this node are being made again")
    if own["healing"]["unreadable"]:
        lines.append(f"{own['healing']['unreadable']} objects have no good copy on either node")
    echo(result, as_json, "\n".join(lines))
    sys.exit(EXIT_BLOCKED if own["single_copy"] or own["healing"]["unreadable"] else 0)


COMMANDS: tuple[click.Command, ...] = (switchover, failover, pause, resume, history, why, risk)
