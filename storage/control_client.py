"""Asks a gateway over the control socket: for its status, or to carry out an order."""

import contextlib
import socket
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from storage.control import (
    Answer,
    Line,
    Order,
    Progress,
    Report,
    StatusReply,
    StatusRequest,
    Tell,
    decode_line,
    encode_line,
)

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


def report(path: Path) -> Report:
    """What the gateway says of itself to the HA agent. Raises OSError."""
    with contextlib.closing(_lines(path, Tell("hello"), TIMEOUT_S)) as lines:
        for reply in lines:
            if isinstance(reply, Report):
                return reply
    raise ConnectionError(0, "closed without an answer")


def order(
    path: Path,
    name: str,
    given: dict[str, Any],
    progress: Callable[[int, int], None] = lambda done, of: None,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Have a gateway carry out an order; returns its result. `timeout_s`: of silence. Raises OSError or OrderFailed."""
    with contextlib.closing(_lines(path, Order(name, given), timeout_s)) as lines:
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
