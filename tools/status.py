"""Asks a gateway for its status over the control socket, and shows it."""

import socket
from pathlib import Path
from typing import Any

from storage.control import StatusReply, StatusRequest, decode_line, encode_line

TIMEOUT_S = 5.0


def ask(path: Path) -> dict[str, Any]:
    """The status document of the node whose control socket this is. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(path))
        connection.sendall(encode_line(StatusRequest()))
        line = b""
        while not line.endswith(b"\n"):
            block = connection.recv(65536)
            if not block:
                raise ConnectionError(0, "closed without an answer")
            line += block
    reply = decode_line(line)
    if not isinstance(reply, StatusReply):
        raise ConnectionError(0, "not an answer to the question")
    return reply.status


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
    for name, node in status["nodes"].items():
        lines.append(f"{name}: {node['role']}")
        for volume in node.get("volumes", []):
            free = f", {size(volume['free'])} free of {size(volume['total'])}" if "free" in volume else ""
            lines.append(f"   {volume['path']}: {volume['state']}{free}")
    return "\n".join(lines)
