"""What processes use: CPU time and syncs, and a disk whose syncs take longer (`slow_sync.c`)."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

SHIM: Final = Path(__file__).with_name("slow_sync.c")
TICKS: Final = os.sysconf("SC_CLK_TCK")
CPU_FIELDS: Final = (11, 12)  # user, system; of /proc/PID/stat behind the name


@contextmanager
def counted(milliseconds: int) -> Iterator[Path]:
    """Processes that are started meanwhile count their syncs, each of which takes so much longer; yields the folder of
    the counts. Needs gcc."""
    with TemporaryDirectory(prefix="tandem-shim-") as made:
        folder = Path(made)
        shim = folder / "slow_sync.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", str(shim), str(SHIM), "-ldl"], check=True)
        counts = folder / "counts"
        counts.mkdir(mode=0o777)
        folder.chmod(0o755)  # the gateway's user loads it too
        counts.chmod(0o1777)
        added = {"LD_PRELOAD": str(shim), "SLOW_SYNC_MS": str(milliseconds), "SLOW_SYNC_COUNT": str(counts)}
        os.environ.update(added)
        try:
            yield counts
        finally:
            for name in added:
                del os.environ[name]


@dataclass(frozen=True)
class Usage:
    """Of one process since its start."""

    cpu_s: float
    syncs: int

    def per_object(self, before: "Usage", count: int) -> dict[str, float]:
        """CPU milliseconds and syncs for each of `count` objects."""
        return {
            "cpu_ms": (self.cpu_s - before.cpu_s) * 1000 / count,
            "syncs": (self.syncs - before.syncs) / count,
        }


def usage(pid: int, counts: Path) -> Usage:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    cpu_s = sum(int(fields[at]) for at in CPU_FIELDS) / TICKS
    file = counts / str(pid)
    return Usage(cpu_s, int.from_bytes(file.read_bytes(), "little") if file.exists() else 0)
