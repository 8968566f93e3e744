"""Asks a gateway over the control socket: for its status, or to carry out an order."""

import contextlib
import json
import socket
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import click
from rich.live import Live
from rich.text import Text

from conf.settings import Settings
from storage.control import Answer, Line, Order, Progress, StatusReply, StatusRequest, decode_line, encode_line

TIMEOUT_S = 5.0
WATCH_S = 1.0


class OrderFailed(Exception):
    """One line from the gateway."""


def ask(path: Path) -> dict[str, Any]:
    """The status document of the node whose control socket this is. Raises OSError."""
    with contextlib.closing(_lines(path, StatusRequest(), TIMEOUT_S)) as lines:
        for reply in lines:
            if isinstance(reply, StatusReply):
                return reply.status
    raise ConnectionError(0, "closed without an answer")


def order(
    path: Path, name: str, given: dict[str, Any], progress: Callable[[int, int], None] = lambda done, of: None
) -> dict[str, Any]:
    """Have a gateway carry out an order; returns its result. Raises OSError or OrderFailed."""
    with contextlib.closing(_lines(path, Order(name, given), None)) as lines:
        for reply in lines:
            if isinstance(reply, Progress):
                progress(reply.done, reply.of)
            elif isinstance(reply, Answer):
                if reply.error:
                    raise OrderFailed(reply.error)
                return reply.result
    raise OrderFailed("the gateway ended before it answered")


def _lines(path: Path, request: Line, timeout_s: float | None) -> Generator[Line, None, None]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
        connection.sendall(encode_line(request))
        with connection.makefile("rb") as replies:
            for line in replies:
                yield decode_line(line)


def printable(text: str) -> str:
    """What came from outside, for a terminal: without control characters, escape sequences and signs that turn or hide
    text."""
    return "".join(char if char.isprintable() or char == " " else "?" for char in text)


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


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
    lines += [f"ALARM: {alarm}" for alarm in status["alarms"]]
    if status.get("conflicts"):
        lines.append(f"{status['conflicts']} studies name more than one patient: `tandem conflicts`")
    behind = status["catch_up"]["behind"]
    if behind:
        lines.append(f"the other node is {behind} entries behind")
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

    with contextlib.suppress(KeyboardInterrupt):
        if as_json:
            while True:
                click.echo(looked())
                time.sleep(WATCH_S)
        with Live(Text(looked()), auto_refresh=False, screen=sys.stdout.isatty()) as live:
            while True:
                time.sleep(WATCH_S)
                live.update(Text(looked()), refresh=True)
