"""What is written to the catalogue at once."""

from dataclasses import dataclass, field
from typing import Any

from storage.state.model import Entry, Location


@dataclass
class Batch:
    """What one transaction does, in this order. `applies` are committed entries in log order."""

    truncate_after: int | None = None
    appends: list[tuple[Entry, Location | None]] = field(default_factory=list)
    applies: list[tuple[Entry, Location | None]] = field(default_factory=list)
    lost: dict[int, tuple[str, Location]] = field(default_factory=dict)  # seq -> (why, where the copy was)
    moved: dict[int, Location] = field(default_factory=dict)  # seq -> where its copy lies from now on
    gone: list[str] = field(default_factory=list)  # keys of `leaving` that are done
    bytes_gone: list[int] = field(default_factory=list)  # inodes whose bytes were removed
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def applied(self) -> int:
        return max((entry.seq for entry, _ in self.applies), default=0)
