"""What tests share: a gateway by itself as a real process, and real image files."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from storage.control_client import ask
from tools.cli.dicom_client import DicomClient, Object

ROOT = Path(__file__).parent.parent
WAIT_S = 60.0
FUZZ = int(os.environ.get("TANDEM_FUZZ", "1"))  # so many times the examples of each property

hypothesis.settings.register_profile("tandem", max_examples=100 * FUZZ, deadline=None)
hypothesis.settings.load_profile("tandem")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What failed is told at once: a run may be ended before its summary."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if report.failed and crash:
        print(f"\n{report.when} of {report.nodeid}: {crash.message}", file=sys.__stderr__, flush=True)


def wait_for(condition: Callable[[], Any], what: str = "", timeout_s: float = WAIT_S) -> Any:
    """The first true value of `condition`; generous, since the machine pauses now and then."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:.0f} s for {what or condition}")
        time.sleep(0.05)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Gateway:
    """`tandem gateway --data DIR` as a process."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.port, self.environment = folder, free_port(), environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Gateway":
        environment = {**os.environ, "TANDEM__DICOM__BIND": '"127.0.0.1"', **self.environment}
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tools", "gateway", "--data", str(self.folder), "--port", str(self.port)],
                env=environment,
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )
        wait_for(self._listens, "the gateway to listen")
        return self

    def _listens(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise AssertionError(f"the gateway ended:\n{self.log()[-2000:]}")
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)

    def rebuild_index(self, *words: str) -> str:
        """Of a stopped one, from its files; returns what the command prints."""
        config = self.folder / "node.toml"
        config.write_text(
            f'[node]\nrun_dir = "{self.folder}"\n[storage]\nstate = "{self.folder / "state"}"\n'
            f'volumes = ["{self.volume}"]\n'
        )
        command = [sys.executable, "-m", "tools", "rebuild-index", "--config", str(config), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def log(self) -> str:
        return (self.folder.parent / f"{self.folder.name}.log").read_text()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def status(self) -> dict[str, Any]:
        return ask(self.folder / "standalone.sock")

    def client(self, *items: Object) -> DicomClient:
        contexts = [(item.sop_class, item.transfer_syntax) for item in items]
        return DicomClient("127.0.0.1", self.port, "TANDEM", contexts, 30)

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    @property
    def volume(self) -> Path:
        return self.folder / "volume"

    def quarantined(self) -> list[Path]:
        return sorted((self.volume / "quarantine").glob("*.json"))


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    made = Gateway(tmp_path_factory.mktemp("gateway") / "data").start()
    yield made
    made.stop()


@pytest.fixture
def new_gateway(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    made: list[Gateway] = []

    def make(**environment: str) -> Gateway:
        made.append(Gateway(tmp_path / f"data{len(made)}", **environment))
        return made[-1].start()

    yield make
    for one in made:
        one.stop(signal.SIGKILL)
