"""`tools/bench heal|scrub|rebuild`: what keeping the archive whole costs, on this machine."""

import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from tools.benchmarks.store import renamed, sample
from tools.cli.dicom_client import DicomClient, Object
from tools.lab.network import NODES, VIP, inside
from tools.lab.pair import AET, DICOM_PORT, Lab, wait_for
from tools.rebuild.making import from_files, open_volumes

WAIT_S: Final = 300.0
DISK_MB: Final = 4000


@contextmanager
def pair(folder: Path | None, volumes: int) -> Iterator[Lab]:
    base = Path(tempfile.mkdtemp(prefix="tandem-bench-", dir=folder or "/dev/shm"))
    lab = Lab(base / "lab")
    try:
        lab.up(5.0, volumes, DISK_MB)
        yield lab
    finally:
        lab.down(keep_data=False)
        shutil.rmtree(base, ignore_errors=True)


def send(item: Object, numbers: range) -> list[float]:
    """Milliseconds of each C-STORE."""
    times = []
    context = [(item.sop_class, item.transfer_syntax)]
    with inside("client"), DicomClient(VIP, DICOM_PORT, AET, context, 60) as client:
        for number in numbers:
            fresh = renamed(item, number)
            start = time.perf_counter()
            if status := client.store(fresh):
                raise click.ClickException(f"status 0x{status:04X}")
            times.append((time.perf_counter() - start) * 1000)
    return times


def status_of(lab: Lab, node: str) -> dict[str, Any]:
    return lab.node_status(node) or {}


def copy_rate(source: Path, target: Path, rounds: int = 3) -> float:
    """Bytes a second of `cp` with a sync at the end, median."""
    rates = []
    for number in range(rounds):
        size = sum(path.stat().st_size for path in source.rglob("*.dcm"))
        start = time.perf_counter()
        subprocess.run(["cp", "-r", str(source), str(target / f"copy{number}")], check=True)
        subprocess.run(["sync", "-f", str(target)], check=True)
        rates.append(size / (time.perf_counter() - start))
        shutil.rmtree(target / f"copy{number}")
    return statistics.median(rates)


def heal(count: int, folder: Path | None) -> None:
    """Healing after a dead disk, and catch-up of an empty node, as a share of `cp` between the same directories."""
    with pair(folder, 2) as lab:
        label = "CT"
        item = sample(label)
        send(item, range(count))
        wait_for("both copies", lab.complete, WAIT_S)
        node = "b" if lab.primary() == "a" else "a"
        full = max(lab.volumes(node), key=lambda path: len(list((path / "archive").rglob("*.dcm"))))
        source = max(lab.volumes(str(lab.primary())), key=lambda path: len(list((path / "archive").rglob("*.dcm"))))
        copies = len(list((full / "archive").rglob("*.dcm")))
        plain = copy_rate(source / "archive", next(path for path in lab.volumes(node) if path != full))
        lab.disks(node).fail(lab.volumes(node).index(full) + 1)
        wait_for("it to be noticed", lambda: status_of(lab, node)["healing"]["missing"] > 0, WAIT_S, 0.005)
        start = time.perf_counter()
        wait_for("the copies", lab.complete, WAIT_S, 0.05)
        rate = copies * len(item.data) / (time.perf_counter() - start)
        click.echo(
            f"{label}: cp {plain / 1e6:.0f} MB/s, healing {copies} copies {rate / 1e6:.0f} MB/s: {rate / plain:.2f}"
        )
        lab.power_off(node)
        shutil.rmtree(lab.node_dir(node) / "images")
        for point in (*lab.volumes(node), lab.node_dir(node) / "state"):
            point.mkdir(exist_ok=True)
        lab.disks(node).create(2)
        lab.power_on(node)
        wait_for("the link", lambda: status_of(lab, node).get("catch_up", {}).get("linked", False), WAIT_S, 0.01)
        start = time.perf_counter()
        wait_for("catch-up", lambda: status_of(lab, node).get("instances", 0) >= count, WAIT_S, 0.05)
        rate = count * len(item.data) / (time.perf_counter() - start)
        click.echo(f"{label}: catch-up of an empty node {rate / 1e6:.0f} MB/s: {rate / plain:.2f}")


def scrub(count: int, folder: Path | None) -> None:
    """C-STORE latency with and without a scrub of both nodes, in turn."""
    with pair(folder, 1) as lab:
        label = "CT"
        item = sample(label)
        send(item, range(count))
        found: dict[str, list[float]] = {"alone": [], "scrub": []}
        at = count
        for _ in range(6):
            found["alone"] += send(item, range(at, at + count // 6))
            at += count // 6
            scrubs = [threading.Thread(target=lab.order, args=(node, "scrub")) for node in NODES]
            for thread in scrubs:
                thread.start()
            found["scrub"] += send(item, range(at, at + count // 6))
            at += count // 6
            for thread in scrubs:
                thread.join()
        medians = {name: statistics.median(times) for name, times in found.items()}
        ratio = medians["scrub"] / medians["alone"]
        click.echo(f"{label}: median {medians['alone']:.2f} ms, while scrubbing {medians['scrub']:.2f} ms: {ratio:.2f}")


def rebuild(count: int, folder: Path | None) -> None:
    """Files a second of `tandem rebuild-index`, median of three runs."""
    from conf.settings import load

    with pair(folder, 1) as lab:
        send(sample("MR"), range(count))
        wait_for("both copies", lab.complete, WAIT_S)
        settings = load(lab.config("b"), {})
        lab.power_off("b")
        rates = []
        for _ in range(3):
            volumes = open_volumes(settings)
            done, _ = from_files(settings, volumes, lambda _: None)
            for volume in volumes:
                volume.close()
            rates.append(done.instances / done.seconds)
        click.echo(f"MR: {count} files, {statistics.median(rates):.0f} files/s")
