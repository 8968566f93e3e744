"""What a leader knows of its follower's log. Pure."""

from dataclasses import dataclass
from enum import Enum

from storage.replication.effects import InvariantBroken

NEVER = float("-inf")


class Stage(Enum):
    UNLINKED = "unlinked"
    GREETED = "greeted"  # Welcome sent, waiting for Joined
    JOINED = "joined"  # entries flow


@dataclass
class Progress:
    """Entries before `next_seq` were sent in this session; up to `acked` it has them durably."""

    stage: Stage = Stage.UNLINKED
    session: int = 0
    next_seq: int = 1
    acked: int = 0
    joined_at: int = 0  # where its log ended when it joined
    whole: bool = False
    moved_at: float = NEVER  # when it last took or acknowledged something
    adopting_at: float = NEVER  # when it last said that it is about to carry out this session's Welcome

    @property
    def joined(self) -> bool:
        return self.stage is Stage.JOINED

    @property
    def waiting(self) -> bool:
        """Something was sent and isn't acknowledged."""
        return self.joined and self.acked < self.next_seq - 1

    @property
    def proven(self) -> bool:
        """It has kept something since it joined."""
        return self.acked > self.joined_at

    def join(self, seq: int, now: float) -> None:
        """It follows from behind `seq` on."""
        self.stage, self.next_seq, self.acked, self.joined_at, self.moved_at = Stage.JOINED, seq + 1, seq, seq, now

    def acknowledge(self, seq: int, now: float) -> bool:
        """Returns whether that says something new."""
        if not self.acked < seq < self.next_seq:
            return False
        self.acked, self.moved_at = seq, now
        return True

    def check(self, window: int) -> None:
        """Raises InvariantBroken."""
        if self.joined and not 0 <= self.next_seq - 1 - self.acked <= window:
            raise InvariantBroken(f"sent up to {self.next_seq - 1}, acknowledged up to {self.acked}")
