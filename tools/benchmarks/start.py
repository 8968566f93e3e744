"""`tools/bench start`: what an archive of many instances costs at start and when it is asked how it is.

The instances are synthetic: rows of a catalogue without files, 200 images a series, UIDs as long as they may be.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

import click
from pydicom.uid import generate_uid

from storage.control_client import ask, order
from storage.objects.local_volume import create_marker
from storage.state.catalogue import MADE_BY, Batch, Catalogue
from storage.state.model import Entry, Location, Put
from storage.state.soundness import OPEN_MARK
from tools.benchmarks.peers import HERE, answers
from tools.lab.pair import wait_for

PER_SERIES: Final = 200
BATCH_SERIES: Final = 10
PORT: Final = 11112
START_S: Final = 3600.0
RUNS: Final = 3
MAP_BYTES: Final = 64 << 30


def made(folder: Path, instances: int) -> None:
    """A volume, and a catalogue of so many instances that lie on it."""
    volume = create_marker(folder / "volume")
    catalogue = Catalogue.open(folder / "state" / "catalogue", MAP_BYTES)
    facts: dict[str, Any] = {"promised": 1, "volumes": [volume], "lineage": "bench", **MADE_BY}
    fill(catalogue, synthetic(volume, instances), instances, facts)
    catalogue.close()


def fill(catalogue: Catalogue, rows: Iterator[tuple[Entry, Location]], count: int, facts: Mapping[str, Any]) -> None:
    """Have so many entries logged and applied, and `facts` of the catalogue kept when all of them are there."""
    last = catalogue.epochs.last[1] + count
    with click.progressbar(length=count, label="making the catalogue", file=sys.stderr) as bar:
        while some := list[tuple[Entry, Location | None]](islice(rows, PER_SERIES * BATCH_SERIES)):
            catalogue.write(Batch(appends=some, applies=some))
            bar.update(len(some))
    catalogue.write(Batch(meta={**facts, "checkpoint": last}))


def synthetic(volume: str, instances: int) -> Iterator[tuple[Entry, Location]]:
    uid = str(generate_uid(prefix="1.2.826.0.1.3680043.8.498."))[:54]
    keys = {
        "PatientName": "Name^Given",
        "PatientBirthDate": "19700101",
        "PatientSex": "F",
        "StudyDate": "20260102",
        "StudyTime": "101112",
        "StudyDescription": "CT of the thorax",
        "Modality": "CT",
        "SeriesNumber": "1",
        "Rows": "512",
        "Columns": "512",
        "BitsAllocated": "16",
    }
    for seq in range(1, instances + 1):
        series = (seq - 1) // PER_SERIES
        study_uid, series_uid, sop = f"{uid}1{series:09d}", f"{uid}2{series:09d}", f"{uid}3{seq:09d}"
        own = {
            **keys,
            "PatientID": f"P{series % 100_000}",
            "StudyInstanceUID": study_uid,
            "SeriesInstanceUID": series_uid,
            "InstanceNumber": str(seq % PER_SERIES),
            "ContentTime": f"10{seq % 60:02d}00",
        }
        put = Put(
            sop,
            "1.2.840.10008.5.1.4.1.1.2",
            study_uid,
            series_uid,
            "1.2.840.10008.1.2.1",
            seq.to_bytes(16, "big"),
            526_000,
            900,
            own,
            "CT1",
            1.7e9 + seq,
        )
        place = f"P{series % 100_000}/20260102_CT_{series:08d}/1_{series:08d}/{sop}.dcm"
        yield Entry(1, seq, put), Location(volume, f"{seq:016x}", place)


class Standalone:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Seconds until it listens."""
        words = [sys.executable, "-m", "tools", "gateway", "--data", str(self._folder), "--port", str(PORT)]
        begin = time.perf_counter()
        with (self._folder / "output").open("ab") as output:
            self._process = subprocess.Popen(words, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        wait_for("the gateway to listen", self._listens, START_S, 0.02)
        return time.perf_counter() - begin

    def _listens(self) -> bool:
        if self._process and self._process.poll() is not None:
            raise click.ClickException(f"the gateway has ended; see {self._folder / 'output'}")
        return answers(HERE, PORT)

    def end(self, number: int) -> float:
        """Seconds until it is gone."""
        begin = time.perf_counter()
        if self._process:
            self._process.send_signal(number)
            self._process.wait(START_S)
        return time.perf_counter() - begin

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    @property
    def memory_mb(self) -> float:
        """Anonymous."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


def _timed(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return sorted(times)[RUNS // 2]


def measure(folder: Path, instances: int) -> dict[str, float]:
    """Seconds, bytes an instance and MB."""
    path = folder / "state" / "catalogue"
    found = {"bytes an instance": os.stat(path / "data.mdb").st_blocks * 512 / instances}
    gateway, control = Standalone(folder), folder / "standalone.sock"
    gateway.start()  # makes the log
    gateway.end(signal.SIGTERM)
    found["start after a clean stop, s"] = gateway.start()
    found["anonymous memory, MB"] = gateway.memory_mb
    found["status, s"] = _timed(lambda: ask(control))
    found["volume list, s"] = _timed(lambda: order(control, "volume-list", {}))
    found["stop, s"] = gateway.end(signal.SIGTERM)
    gateway.start()
    gateway.end(signal.SIGKILL)
    found["start after a kill, s"] = gateway.start()
    gateway.end(signal.SIGKILL)
    (path / OPEN_MARK).write_text("another boot")  # as after a power cut: every page is read once
    found["start after a power cut, s"] = gateway.start()
    gateway.end(signal.SIGTERM)
    return found


@click.command()
@click.option("--instances", default=100_000, show_default=True, help="How many the archive has.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where to write; default: a tmpfs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def start(instances: int, folder: Path | None, as_json: bool) -> None:
    """Start, status, volume list and memory of a gateway with many instances, and their size on disk."""
    base = Path(tempfile.mkdtemp(prefix="tandem-bench-", dir=folder or "/dev/shm"))
    try:
        made(base, instances)
        found = measure(base, instances)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if as_json:
        click.echo(json.dumps({"instances": instances, **found}))
        return
    click.echo(f"{instances} instances")
    for name, value in found.items():
        click.echo(f"  {name:<28} {value:>10.2f}")
