"""A gateway by itself whose share is mounted: two real processes, and the kernel's FUSE."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Gateway, wait_for

CAN_MOUNT = os.geteuid() == 0 and Path("/dev/fuse").exists()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/gateway/share/" in str(item.path) and not CAN_MOUNT:
            item.add_marker(pytest.mark.skip(reason="needs root and /dev/fuse"))


class Mounted:
    """What `tandem mount` shows of a gateway."""

    def __init__(self, gateway: Gateway, point: Path) -> None:
        self.gateway, self.point = gateway, point
        self._process: subprocess.Popen[bytes] | None = None
        point.mkdir(exist_ok=True)

    def mount(self) -> "Mounted":
        words = [sys.executable, "-m", "tools", "mount", str(self.point), "--data", str(self.gateway.folder)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT)
        wait_for(self._is_mounted, "the mount")
        return self

    @property
    def log(self) -> Path:
        return self.point.with_name(f"{self.point.name}.log")

    def _is_mounted(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise AssertionError(f"it ended:\n{self.log.read_text()[-2000:]}")
        return os.path.ismount(self.point)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Have it unmount, or kill it; then nothing is mounted any more."""
        code = 0
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(number)
            code = self._process.wait(30)
        while str(self.point) in Path("/proc/self/mounts").read_text():
            subprocess.run(
                ["umount", "-l", str(self.point)], check=False, capture_output=True
            )  # it may be at it itself
        return code

    def ended(self) -> int:
        """By itself."""
        assert self._process is not None
        return self._process.wait(30)


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="tandem-test-", dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def new_mounted(scratch: Path) -> Iterator[Callable[[], Mounted]]:
    made: list[Mounted] = []
    folder = Path(tempfile.mkdtemp(dir=scratch))

    def make() -> Mounted:
        gateway = Gateway(folder / f"data{len(made)}").start()
        made.append(Mounted(gateway, folder / f"mount{len(made)}"))
        return made[-1].mount()

    yield make
    for one in made:
        one.end(signal.SIGKILL)
        one.gateway.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def mounted(scratch: Path) -> Iterator[Mounted]:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    gateway = Gateway(folder / "data").start()
    made = Mounted(gateway, folder / "mount")
    try:
        yield made.mount()
    finally:
        made.end()
        gateway.stop()
