"""SIGHUP: a gateway that runs takes over what can change while it runs, or keeps what it has if the file is wrong."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pynetdicom import AE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from tests.conftest import free_port, wait_for


class Gateway:
    def __init__(self, folder: Path) -> None:
        self.file, self.log, self.port = folder / "node.toml", folder / "log", free_port()
        self.folder = folder
        self.write("")
        (folder / "volume").mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools", "gateway", "--config", str(self.file)], stderr=self.log.open("w")
        )
        wait_for(self.log.read_text, "the gateway's first word")
        os.kill(self.process.pid, signal.SIGHUP)  # at no time does it end a gateway that starts
        wait_for(lambda: self.lines("dicom.listening"), "the gateway to listen")

    def write(self, more: str, *, port: int = 0, text: str = "") -> None:
        self.file.write_text(
            text
            or f'[node]\nname = "n"\nrun_dir = "{self.folder}"\n'
            f'[storage]\nstate = "{self.folder}/state"\nvolumes = ["{self.folder}/volume"]\n'
            f'[dicom]\nbind = "127.0.0.1"\nport = {port or self.port}\n{more}'
        )

    def hang_up(self, event: str) -> dict[str, object]:
        """Send SIGHUP; returns the next line of this event."""
        wait_for(lambda: self.lines("settings.reloaded"), "the hang-up of the start")
        before = len(self.lines(event))
        os.kill(self.process.pid, signal.SIGHUP)
        wait_for(lambda: len(self.lines(event)) > before, event)
        return self.lines(event)[-1]

    def lines(self, event: str) -> list[dict[str, object]]:
        found = [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]
        return [line for line in found if line["event"] == event]

    def lets_in(self, title: str) -> bool:
        ae = AE(ae_title=title)
        ae.add_requested_context(Verification)
        association = ae.associate("127.0.0.1", self.port, ae_title="TANDEM")
        established = bool(association.is_established)
        if established:
            association.release()
        return established


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    running = Gateway(tmp_path)
    yield running
    running.process.terminate()
    running.process.wait(60)


def test_who_may_connect_changes_at_once(gateway: Gateway) -> None:
    assert gateway.lets_in("STRANGER")
    gateway.write('calling_aets = ["CT1"]\n')
    assert gateway.hang_up("settings.reloaded")["restart_needed_for"] == []
    assert not gateway.lets_in("STRANGER")
    assert gateway.lets_in("CT1")


def test_wrong_settings_change_nothing(gateway: Gateway) -> None:
    gateway.write("", text="[dicom]\nno_such_key = 1\n")
    assert "no_such_key" in str(gateway.hang_up("settings.not_reloaded")["why"])
    assert gateway.lets_in("STRANGER")


def test_what_needs_a_restart_is_named(gateway: Gateway) -> None:
    gateway.write("", port=free_port())
    assert gateway.hang_up("settings.reloaded")["restart_needed_for"] == ["dicom.port"]
    assert gateway.lets_in("STRANGER")
