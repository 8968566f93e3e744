"""A file that one running process holds: a second one on the same folder gets one clear line instead of the data.

The lock is flock(2) on the file itself: it ends with the process, however that ends.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import Final

STATE_LOCK: Final = "lock"


class InUse(OSError):
    """Another process has it open."""

    def __init__(self, path: Path, pid: str) -> None:
        by = f"process {pid}" if pid else "another process"
        super().__init__(errno.EBUSY, f"{path.parent} is in use by {by}; is a gateway running on it?")


class Lock:
    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Take the lock on `path`. Raises InUse, OSError."""
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o640)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise InUse(path, _holder(path)) from None
        except OSError:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Give it up."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def lock_state(state: Path) -> Lock:
    """The state folder of a node: whoever has its catalogue open. Raises InUse, OSError."""
    state.mkdir(parents=True, exist_ok=True)
    return Lock(state / STATE_LOCK)


def _holder(path: Path) -> str:
    """The process that holds a lock (proc(5), /proc/locks), "" if that can't be seen."""
    try:
        wanted = path.stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            parts = line.split()
            if "->" not in parts and parts[1] == "FLOCK" and parts[5].rpartition(":")[2] == str(wanted):
                return parts[4]
    except (OSError, IndexError):
        pass
    return ""
