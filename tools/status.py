"""Asks a gateway over the control socket: for its status, or to carry out an order."""

import contextlib
import socket
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from storage.control import Answer, Line, Order, Progress, StatusReply, StatusRequest, decode_line, encode_line

TIMEOUT_S = 5.0


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


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def render(status: dict[str, Any]) -> str:
    lines = [
        f"node {status['node']}, {status['role']} ({status['mode']}), cluster {status['cluster'] or '-'}",
        f"epoch {status['epoch']}, primary {status['primary'] or '-'}, in sync: {', '.join(status['in_sync']) or '-'}",
        f"virtual addresses here: {', '.join(status['vips']) or '-'}",
        f"{status['instances']} instances in {status['studies']} studies, {size(status['bytes'])}; "
        f"{status['single_copy']} with one copy only",
    ]
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
