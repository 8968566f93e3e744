"""The service units: systemd takes them, and the services tell it that they are ready and alive."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import conf
from conf.notify import notify
from tests.conftest import Gateway

UNITS = sorted((Path(conf.__file__).parent / "systemd").glob("*.service"))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_takes_the_unit(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if unit.name in line]
    # Not installed here, and files of other packages: neither is the unit's fault.
    assert [line for line in lines if "is not executable" not in line and "not found" not in line] == []


def test_units_start_commands_that_exist() -> None:
    from tools.cli.main import main

    started = [line.split()[1] for unit in UNITS for line in unit.read_text().splitlines() if "/bin/tandem " in line]
    assert sorted(started) == ["gateway", "ha", "inbox", "mount"]
    assert set(started) <= set(main.list_commands(click.Context(main)))


def test_gateway_says_that_it_is_ready_alive_and_stopping(new_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(path))
        channel.settimeout(60)
        gateway = new_gateway(NOTIFY_SOCKET=str(path), WATCHDOG_USEC="300000")
        assert {channel.recv(100) for _ in range(3)} == {b"READY=1", b"WATCHDOG=1"}
        gateway.stop(signal.SIGTERM)
        heard = set()
        while b"STOPPING=1" not in heard:
            heard.add(channel.recv(100))


def test_nobody_to_notify() -> None:
    assert "NOTIFY_SOCKET" not in os.environ
    assert not notify("READY=1")
