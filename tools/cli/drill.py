"""`tandem drill` and `tandem maintenance`: planned switchovers, to be sure of the unplanned ones, and for work."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import click
from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom.sop_class import Verification

from conf.settings import ClusterSettings, Settings
from ha.etcd import DeleteKey, EtcdError, HttpEtcd, PutKey
from storage.control_client import ask
from tools.benchmarks.outage import Probe
from tools.cli.cluster import look, own_status, switch, with_etcd
from tools.cli.dicom_client import AssociationFailed, DicomClient, NotLetIn
from tools.cli.exits import EXIT_FOUND
from tools.cli.importing import CALLING
from tools.cli.options import Failure, config_option, dicom_host, json_option, settings_of, sure, yes_option
from tools.cli.say import say

PAUSE_S: Final = 0.05
ANSWER_S: Final = 1.0
CALM_S: Final = 2.0
SYNC_S: Final = 120.0
GOAL_S: Final = 5.0


def viewer(host: str, port: int, aet: str) -> Probe:
    """Asks for an association again and again; only a node that serves accepts one, or says who may have one."""
    context = [(str(Verification), str(ImplicitVRLittleEndian))]

    def attempt(answered: Callable[[], None], _stopped: Callable[[], bool]) -> None:
        with contextlib.suppress(OSError, AssociationFailed):
            with contextlib.suppress(NotLetIn):
                DicomClient(host, port, aet, context, ANSWER_S, calling=CALLING).close()
            answered()

    return Probe(attempt, pause_s=PAUSE_S)


@click.command()
@config_option
@click.option("--goal", default=GOAL_S, show_default=True, help="Longest outage that passes, seconds.")
@yes_option
@json_option
def drill(config: Path | None, goal: float, yes: bool, as_json: bool) -> None:
    """Switch over and back, and report what clients would have noticed. Exit 4 if it can't be done, takes long, or
    what follows the address doesn't run again."""
    settings = settings_of(config)
    status = own_status(settings)
    blocks = _not_now(status)
    if blocks:
        raise Failure(f"no drill now: {blocks}", EXIT_FOUND)
    sure("Requests are interrupted for a moment, twice. Go on?", yes)

    async def legs(_: Settings, cluster: ClusterSettings, etcd: HttpEtcd) -> list[dict[str, Any]]:
        done = []
        for _leg in range(2):
            await _calm(settings)
            started = time.monotonic()
            result = await switch(settings, cluster, etcd, None)
            await asyncio.sleep(CALM_S)
            history = (await look(etcd, cluster.name)).history
            outage = round(await asyncio.to_thread(probe.longest_gap_s, started), 2)
            done.append({**result, "outage_s": outage, "parts": history[-1].get("parts", {}) if history else {}})
        return done

    with viewer(dicom_host(settings), settings.dicom.port, settings.dicom.aet) as probe:
        done = with_etcd(config, legs)
    follow = _followers(settings)
    idle = [name for name, state in follow.items() if state != "running"]
    passed = all(leg["outage_s"] <= goal for leg in done) and not idle
    result = {
        "at": datetime.now().isoformat(timespec="seconds"),
        "passed": passed,
        "goal_s": goal,
        "legs": done,
        "follow": follow,
    }
    lines = [
        f"{leg['from']} -> {leg['to']}: {leg['outage_s']:.2f} s without an answer; "
        + ", ".join(f"{name.removesuffix('_s').replace('_', ' ')} {value} s" for name, value in leg["parts"].items())
        for leg in done
    ]
    lines += [f"{name}: {state}" for name, state in follow.items()]
    why = f"doesn't run again: {', '.join(idle)}" if idle else f"more than {goal} s"
    lines.append("passed" if passed else f"NOT passed: {why}")
    say(result, as_json, "\n".join(lines))
    sys.exit(0 if passed else EXIT_FOUND)


def _followers(settings: Settings) -> dict[str, str]:
    """What follows the address, once it runs again where this node is primary; how it is after a while otherwise."""
    deadline = time.monotonic() + SYNC_S
    while True:
        status = ask(settings.control_socket)
        found: dict[str, str] = status.get("follow") or {}
        if status["primary"] != status["node"]:
            return {}
        if all(state == "running" for state in found.values()) or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def _not_now(status: dict[str, Any]) -> str:
    """Why a drill would do harm, "" if it wouldn't."""
    if sorted(status["in_sync"]) != sorted(status["nodes"]) or len(status["nodes"]) < 2:
        return f"only {', '.join(status['in_sync']) or 'nobody'} in sync"
    if status["single_copy"] or status["healing"]["missing"] or status["files"]["single_copy"]:
        return "not every object or file has two copies; `tandem risk` shows them"
    return "etcd doesn't answer" if not status["etcd"] else str(status["trouble"])


async def _calm(settings: Settings) -> None:
    """Wait until the pair is in sync. Raises Failure."""
    deadline = time.monotonic() + SYNC_S
    while True:
        blocks = _not_now(await asyncio.to_thread(ask, settings.control_socket))
        if not blocks:
            await asyncio.sleep(CALM_S)
            return
        if time.monotonic() > deadline:
            raise Failure(f"the pair isn't whole after {SYNC_S:.0f} s: {blocks}", EXIT_FOUND)
        await asyncio.sleep(0.5)


@click.command()
@config_option
@click.argument("state", type=click.Choice(["on", "off"]))
@json_option
def maintenance(config: Path | None, state: str, as_json: bool) -> None:
    """Prepare this node for work: the other one serves, this one doesn't take over, and nobody is alerted of it."""

    async def work(settings: Settings, cluster: ClusterSettings, etcd: HttpEtcd) -> dict[str, Any]:
        node, found = settings.node.name, await look(etcd, cluster.name)
        key = f"{found.prefix}maintenance/{node}"
        if state == "off":
            await etcd.txn((), (DeleteKey(key),))
            return {"node": node, "maintenance": False, "primary": found.leader}
        if cluster.peer in found.records.maintained:
            raise Failure(f"node {cluster.peer} is under maintenance; one at a time", EXIT_FOUND)
        await etcd.txn((), (PutKey(key, str(time.time())),))  # first, so that nobody is alerted of the switchover
        primary = found.leader
        if primary == node:
            try:
                primary = (await switch(settings, cluster, etcd, cluster.peer))["to"]
            except BaseException:
                if node not in found.records.maintained:
                    with contextlib.suppress(EtcdError):
                        await etcd.txn((), (DeleteKey(key),))
                raise
        return {"node": node, "maintenance": True, "primary": primary}

    result = with_etcd(config, work)
    what = "may be worked on; `tandem maintenance off` afterwards" if result["maintenance"] else "takes part again"
    say(result, as_json, f"node {result['node']} {what}; node {result['primary'] or '-'} is primary")


COMMANDS: tuple[click.Command, ...] = (drill, maintenance)
