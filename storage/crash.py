"""Named crash points around every durable step, for tests: the process kills itself there as a power cut would.

Armed by `tandem lab crash`. In a process that isn't armed a point costs one comparison.
"""

import os
import signal
from typing import Final

POINTS: Final = (
    "incoming.before_fsync",
    "incoming.after_fsync",
    "log.before_append",
    "log.after_append",
    "journal.before_commit",
    "journal.after_commit",
    "journal.after_publish",
    "journal.before_become",
    "journal.after_become",
    "primary.before_prepare",
    "primary.before_answer",
    "standby.before_ack",
    "heal.before_move",
    "leaving.after_move",
)

_armed: str = ""
_left: int = 0


def arm(name: str, count: int = 1) -> None:
    """Raises ValueError for a name that isn't a crash point."""
    global _armed, _left
    if name and name not in POINTS:
        raise ValueError(f"{name} isn't a crash point; there are: {', '.join(POINTS)}")
    _armed, _left = name, count


def point(name: str) -> None:
    global _left
    if _armed != name:
        return
    _left -= 1
    if _left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
