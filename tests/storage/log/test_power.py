"""The log on a real file system whose power is cut while entries are being written."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.log.folder import LocalFolder
from storage.log.log import Log
from storage.log.records import Record
from tests.conftest import ROOT, wait_for
from tools.lab.disks import Disks

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for loop devices")
SIZE_MB = 64
SEGMENT_BYTES = 1 << 20
CUTS = 5
WRITER = """
import sys
from pathlib import Path
from storage.log.folder import LocalFolder
from storage.log.log import Log
from tests.storage.log.test_power import SEGMENT_BYTES, entry
log = Log(LocalFolder(Path(sys.argv[1])), SEGMENT_BYTES)
if not log.lineage:
    log.begin("lineage")
while True:
    seq = log.last[1] + 1
    log.append([entry(one) for one in range(seq, seq + seq % 7 + 1)])
    log.trim(seq - 300)
    print(log.last[1], flush=True)
"""


def entry(seq: int) -> Record:
    return Record(1, seq, bytes([seq % 251]) * (seq * 37 % 5000))


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    made = Disks(tmp_path / "disks", SIZE_MB)
    try:
        made.create(1)
        yield made
    finally:
        made.unmount()


def still_used(disks: Disks) -> bool:
    """A file system that was shut down and isn't gone yet would be found again."""
    done = subprocess.run(
        ["losetup", "--list", "--noheadings", "--output", "BACK-FILE"], capture_output=True, text=True
    )
    return str(disks.folder) in done.stdout


def test_what_was_acknowledged_is_there(disks: Disks) -> None:
    folder, first = disks.folder / "state" / "log", 1
    for _ in range(CUTS):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as writer:
            assert writer.stdout
            acknowledged = [int(writer.stdout.readline()) for _ in range(150)]
            disks.cut_power()  # what the writer says before its first error is promised all the same
            acknowledged += [int(line) for line in writer.stdout]
        disks.unmount()
        wait_for(lambda: not still_used(disks), "the kernel to let go of the disks")
        disks.mount()
        local = LocalFolder(folder)
        log = Log(local, SEGMENT_BYTES)
        assert log.last[1] >= acknowledged[-1]
        assert list(log.records(log.first)) == [entry(seq) for seq in range(log.first, log.last[1] + 1)]
        first = log.first
        log.close()
        local.close()
    assert first > 1
