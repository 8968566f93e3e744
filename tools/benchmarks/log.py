"""`tools/bench log`: what makes an object durable sooner, its bytes in the log's record or in a file beside it."""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import click

from storage.log.folder import LocalFolder
from storage.log.log import Log
from storage.log.records import Record
from tools.benchmarks.meters import counted

SIZES: Final = (4 << 10, 16 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20)
RECORD_BYTES: Final = 600  # of an entry without the object's bytes


class Beside:
    """A file for each object, synced while the log's record is; then its name, in the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._names = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def keep(self, data: bytes) -> None:
        self._number += 1
        fd = os.open(self._folder / f"{self._number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.fsync(self._names)


def measure(folder: Path, count: int) -> None:
    """Print a line for each size: medians of both ways, taken in turn."""
    log = Log(LocalFolder(folder / "log"))
    log.begin("bench")
    log.prepare()
    (folder / "objects").mkdir()
    beside = Beside(folder / "objects")
    click.echo("bytes     in the record   in a file beside   ratio")
    with ThreadPoolExecutor(1) as pool:
        for size in SIZES:
            data, inline, apart = os.urandom(size), list[float](), list[float]()
            for _ in range(count):
                log.trim(log.last[1])
                log.prepare()
                start = time.perf_counter()
                log.append([Record(1, log.last[1] + 1, data)])
                inline.append(time.perf_counter() - start)
                start = time.perf_counter()
                job = pool.submit(beside.keep, data)
                log.append([Record(1, log.last[1] + 1, data[:RECORD_BYTES])])
                job.result()
                apart.append(time.perf_counter() - start)
            one, other = statistics.median(inline), statistics.median(apart)
            click.echo(f"{size:>8} {one * 1000:>12.2f} ms {other * 1000:>15.2f} ms {one / other:>9.2f}")


@click.command()
@click.option("--count", default=60, show_default=True, help="Objects of each size and way.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where to write; default: a tmpfs.")
@click.option("--sync-ms", default=0, show_default=True, help="Let each sync take so much longer.")
def log(count: int, folder: Path | None, sync_ms: int) -> None:
    """Until when an object is durable: its bytes in the log's record, or in a file synced beside it."""
    if sync_ms:
        with counted(sync_ms):
            words = [sys.executable, "-m", "tools.benchmarks.commands", "log", "--count", str(count)]
            words += ["--dir", str(folder)] if folder else []
            sys.exit(subprocess.run(words).returncode)
    base = Path(tempfile.mkdtemp(prefix="tandem-bench-", dir=folder or "/dev/shm"))
    try:
        measure(base, count)
    finally:
        shutil.rmtree(base)
