"""`tools/bench failover`: the outage that a C-STORE sender sees who connects again at once, for each kind of fault."""

import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Final

import click

from tools.benchmarks.ctdb import outages, smb_client
from tools.benchmarks.outage import Probe
from tools.benchmarks.store import renamed, sample
from tools.cli.dicom_client import AssociationFailed, DicomClient
from tools.lab.network import VIP, inside, namespace, namespaces
from tools.lab.pair import AET, DICOM_PORT, Lab, wait_for

TTL_S: Final = 3.0
ANSWER_S: Final = 1.0  # a sender that hears nothing for so long connects again
CONNECT_S: Final = (
    0.25  # and so long it waits for a connection: else it were measured how long a lost SYN is waited for
)
WAIT_S: Final = 180.0
CALM: Final = 20  # Successes before and after a fault


def sender() -> Probe:
    """Stores small images one after the other, and connects again at once when that fails."""
    item, numbers = sample("MR"), count(1)
    context = [(item.sop_class, item.transfer_syntax)]

    def attempt(answered: Callable[[], None], stopped: Callable[[], bool]) -> None:
        with (
            contextlib.suppress(OSError, AssociationFailed),
            DicomClient(VIP, DICOM_PORT, AET, context, ANSWER_S, CONNECT_S) as client,
        ):
            while not stopped():
                if client.store(renamed(item, next(numbers))) == 0:
                    answered()

    return Probe(attempt, place=lambda: inside("client"))


def failover(runs: int, who: str, folder: Path | None) -> None:
    """Median and worst outage in `runs` of each kind of fault, of a C-STORE sender and of an SMB client that connect
    again at once; of CTDB and smbd an SMB client, with their defaults and with tuned keepalives.
    """
    base = Path(tempfile.mkdtemp(prefix="tandem-bench-", dir=folder or "/dev/shm"))
    try:
        click.echo(f"Tandem: lease TTL {TTL_S:.0f} s. Seconds without an answer.")
        click.echo(f"{'who and fault':44}{'median':>8}{'worst':>8}{'runs':>6}")
        for name, gaps in _tandem(Lab(base / "lab"), runs) if who != "ctdb" else ():
            _show(name, gaps)
        for tuned in (False, True) if who != "tandem" else ():
            for name, gaps in outages(base / "ctdb", tuned, runs):
                _show(f"CTDB {'tuned' if tuned else 'defaults'}, SMB: {name}", gaps)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _show(name: str, gaps: list[float]) -> None:
    click.echo(f"{name:44}{statistics.median(gaps):>8.2f}{max(gaps):>8.2f}{len(gaps):>6}")


def _tandem(lab: Lab, runs: int) -> Iterator[tuple[str, list[float]]]:
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
        for name, fault in faults.items():
            pairs = [_one(lab, fault) for _ in range(runs)]
            yield f"Tandem, C-STORE: {name}", [pair[0] for pair in pairs]
            yield f"Tandem, SMB: {name}", [pair[1] for pair in pairs]
    finally:
        lab.down(keep_data=False)


def _one(lab: Lab, fault: Callable[[str], None]) -> tuple[float, float]:
    """Outage of C-STORE and of SMB."""
    with sender() as images, smb_client() as files:
        for probe in (images, files):
            probe.wait_for_more(CALM, WAIT_S)
        while (node := lab.primary()) is None:  # while it changes neither node says so
            time.sleep(0.1)
        started = time.monotonic()
        fault(node)
        for probe in (images, files):
            probe.wait_for_more(CALM, WAIT_S)
        time.sleep(1.0)
        for probe in (images, files):
            probe.wait_for_more(1, WAIT_S)
        gaps = images.longest_gap_s(started), files.longest_gap_s(started)
    if namespace(node) not in namespaces():
        lab.power_on(node)
    wait_for("the pair to be in sync", lab.in_sync, WAIT_S)
    time.sleep(2.0)
    return gaps
