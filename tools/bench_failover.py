"""`tools/bench failover`: the outage that a C-STORE sender sees who connects again at once, for each kind of fault."""

import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Final

import click

from tools.bench_store import SAMPLES, renamed, sample
from tools.dicom_client import AssociationFailed, DicomClient
from tools.lab import AET, DICOM_PORT, VIP, Lab, inside, namespace, namespaces, wait_for

TTL_S: Final = 3.0
ANSWER_S: Final = 1.0  # a sender that hears nothing for so long connects again
WAIT_S: Final = 180.0
CALM: Final = 20  # Successes before and after a fault


class Sender:
    """Stores small images one after the other and notes when each was acknowledged."""

    def __init__(self) -> None:
        self.successes: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sender":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        item, number = sample(*SAMPLES[1][1:]), 0
        context = [(item.sop_class, item.transfer_syntax)]
        with inside("client"):
            while not self._stop.is_set():
                with (
                    contextlib.suppress(OSError, AssociationFailed),
                    DicomClient(VIP, DICOM_PORT, AET, context, ANSWER_S) as client,
                ):
                    while not self._stop.is_set():
                        number += 1
                        if client.store(renamed(item, number)) == 0:
                            self.successes.append(time.monotonic())

    def wait_for_more(self, count: int) -> None:
        target = len(self.successes) + count
        wait_for("Successes", lambda: len(self.successes) >= target, WAIT_S, 0.02)

    def longest_gap(self, since: float) -> float:
        """Seconds between two Successes, the longest that ended after `since`."""
        times = list(self.successes)
        return max(after - before for before, after in pairwise(times) if after > since)


def failover(runs: int, folder: Path | None) -> None:
    """Median and worst of `runs` for each kind of fault."""
    base = Path(tempfile.mkdtemp(prefix="tandem-bench-", dir=folder or "/dev/shm"))
    lab = Lab(base / "lab")

    def planned(node: str) -> None:
        argv, environment = lab.command(node, [sys.executable, "-m", "tools", "switchover"])
        subprocess.run(argv, env=environment, check=True, capture_output=True)

    faults: dict[str, Callable[[str], None]] = {
        "planned switchover": planned,
        "kill -9 gateway": lambda node: lab.kill(node, "gateway"),
        "kill -9 ha": lambda node: lab.kill(node, "ha"),
        "power loss": lab.power_off,
    }
    try:
        lab.up(TTL_S, 1)
        click.echo(f"lease TTL {TTL_S:.0f} s, a sender waits {ANSWER_S:.0f} s for an answer; seconds without Success")
        click.echo(f"{'fault':22}{'median':>8}{'worst':>8}{'runs':>6}")
        for name, fault in faults.items():
            gaps = [_one(lab, fault) for _ in range(runs)]
            click.echo(f"{name:22}{statistics.median(gaps):>8.1f}{max(gaps):>8.1f}{runs:>6}")
    finally:
        lab.down(keep_data=False)
        shutil.rmtree(base, ignore_errors=True)


def _one(lab: Lab, fault: Callable[[str], None]) -> float:
    with Sender() as sender:
        sender.wait_for_more(CALM)
        while (node := lab.primary()) is None:  # while it changes neither node says so
            time.sleep(0.1)
        started = time.monotonic()
        fault(node)
        sender.wait_for_more(CALM)
        gap = sender.longest_gap(started)
    if namespace(node) not in namespaces():
        lab.power_on(node)
    wait_for("the pair to be in sync", lab.in_sync, WAIT_S)
    time.sleep(1.0)
    return gap
