"""What a gateway counts, as Prometheus reads it."""

import re
import socket
import urllib.request
from collections.abc import Callable

from gateway.health import CONNECTIONS_MAX
from tests.builders import item
from tests.conftest import Gateway, free_port, wait_for


def read(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_stores_and_how_long_they_take_are_counted(new_gateway: Callable[..., Gateway]) -> None:
    port = free_port()
    gateway = new_gateway(TANDEM__HTTP__PORT=str(port), TANDEM__HTTP__BIND='"127.0.0.1"')
    items = [item() for _ in range(5)]
    with gateway.client(*items) as client:
        assert all(client.store(one) == 0 for one in items)
    wait_for(lambda: read(port)["tandem_instances"] == 5, "the figures of five instances")
    figures = read(port)
    assert figures['tandem_requests_total{outcome="done",service="C-STORE"}'] == 5
    assert figures["tandem_received_bytes_total"] > sum(len(one.data) for one in items) / 2
    assert figures["tandem_commit_seconds_count"] == figures["tandem_sync_seconds_count"] == 5
    assert figures["tandem_commit_seconds_sum"] > 0
    assert figures["tandem_uncommitted"] == 0
    assert any(re.match("tandem_build_info", name) for name in figures)
    assert {figures[f'tandem_waiting{{queue="{name}"}}'] for name in ("disks", "readers", "converter")} == {0}


def test_connections_that_are_silent_make_room(new_gateway: Callable[..., Gateway]) -> None:
    """Descriptors are for images; whoever looks at a node is let in all the same. Listens on loopback by default."""
    port = free_port()
    new_gateway(TANDEM__HTTP__PORT=str(port))
    silent = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(CONNECTIONS_MAX + 20)]
    try:
        wait_for(lambda: sum(is_closed(one) for one in silent) >= 20, "the oldest to be ended")
        assert read(port)["tandem_instances"] == 0
        assert not is_closed(silent[-1])
    finally:
        for one in silent:
            one.close()


def is_closed(one: socket.socket) -> bool:
    one.setblocking(False)
    try:
        return one.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
