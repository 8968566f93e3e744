"""The status document of a node for people, and what else is printed for them."""

import json
import signal
import sys
import threading
import time
from typing import Any

import click

from conf.settings import Settings
from storage.control_client import ask

WATCH_S = 1.0


def printable(text: str) -> str:
    """What came from outside, for a terminal: without control characters, escape sequences and signs that turn or hide
    text."""
    return "".join(char if char.isprintable() or char == " " else "?" for char in text)


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    from rich.filesize import decimal

    return decimal(int(count))


def _state_of(link: dict[str, Any]) -> str:
    return "in use" if link["used"] else "up" if link["up"] else "DOWN"


def render(status: dict[str, Any]) -> str:
    lines = [
        f"node {status['node']}, {status['role']} ({status['mode']}), cluster {status['cluster'] or '-'}",
        f"epoch {status['epoch']}, primary {status['primary'] or '-'}, in sync: {', '.join(status['in_sync']) or '-'}",
        f"virtual addresses here: {', '.join(status['vips']) or '-'}",
        f"{status['instances']} instances in {status['studies']} studies, {size(status['bytes'])}; "
        f"{status['single_copy']} with one copy only",
    ]
    if len(status["links"]) > 1:
        lines.append("links: " + "; ".join(f"{link['route']} {_state_of(link)}" for link in status["links"]))
    if status["trouble"]:
        lines.append(f"TROUBLE: {status['trouble']}")
    if follow := status.get("follow"):
        lines.append("follows the address: " + ", ".join(f"{name} {state}" for name, state in follow.items()))
    if (files := status["files"])["count"]:
        lines.append(
            f"share: {files['count']} files and folders, {files['images']} are DICOM instances "
            f"({files['doubles']} kept elsewhere, too), {files['unlooked']} to be looked at; "
            f"{files['single_copy']} with one copy only"
        )
    lines += [f"ALARM: {alarm}" for alarm in status["alarms"]]
    if status.get("conflicts"):
        lines.append(f"{status['conflicts']} studies name more than one patient: `tandem conflicts`")
    behind = status["catch_up"]["behind"]
    if behind:
        lines.append(f"the other node is {behind} entries behind")
    if state := status["catch_up"]["state"]:
        why = f"; it couldn't before: {state['why_not']}" if state["why_not"] else ""
        lines.append(f"this node takes the other one's state: {state['rows']} of {state['of']} rows{why}")
    healing = status["healing"]
    if healing["missing"]:
        left = f", about {healing['seconds_left']} s left" if healing["seconds_left"] else ""
        lines.append(f"{healing['missing']} copies of this node are being made again{left}")
    if healing["unreadable"]:
        lines.append(f"{healing['unreadable']} objects have no good copy on either node now")
    for name, node in status["nodes"].items():
        lines.append(f"{name}: {node['role']}")
        for volume in node.get("volumes", []):
            free = f", {size(volume['free'])} free of {size(volume['total'])}" if "free" in volume else ""
            lines.append(f"   {volume['path']}: {volume['state']}{free}")
    return "\n".join(lines)


def watch_status(settings: Settings, as_json: bool) -> None:
    """A live view until Ctrl-C, also while the gateway is away."""
    from rich.live import Live
    from rich.text import Text

    before: tuple[float, int] | None = None

    def looked() -> str:
        nonlocal before
        try:
            found = ask(settings.control_socket)
        except OSError as error:
            before = None
            away = {"node": settings.node.name, "error": error.strerror}
            return json.dumps(away) if as_json else f"node {settings.node.name}: its gateway isn't running"
        if as_json:
            return json.dumps(found)
        now, count = time.monotonic(), int(found["instances"])
        pace = (count - before[1]) / (now - before[0]) if before else 0.0
        before = (now, count)
        return f"{render(found)}\n{time.strftime('%H:%M:%S')}  {pace:.0f} instances/s"

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    if as_json:
        while not ended.is_set():
            click.echo(looked())
            ended.wait(WATCH_S)
        return
    with Live(Text(looked()), auto_refresh=False, screen=sys.stdout.isatty()) as live:
        while not ended.wait(WATCH_S):
            live.update(Text(looked()), refresh=True)
