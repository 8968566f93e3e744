"""Names and attributes as the share's one writer sees them: what the catalogue has, and what was proposed since.

A change is decided at once, on what all changes before it will have made of the rows, and proposed to the log in that
order. So it can be used by the next before it is committed; who asked for it is answered when it is. The rows on both
nodes are changed by the log alone. What isn't committed after all was never answered, and ends with this object.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeVar

from storage.files.overlay import Changes, Overlay
from storage.state.changes import meta
from storage.state.file_model import Change
from storage.state.files import Applied, apply
from storage.state.kv import KeyValues, Readable, Transaction

T = TypeVar("T")
Cell = tuple[str, bytes]


class Proposal(Protocol):
    """A change on its way. `seq`: its number in the log, 0 as long as that isn't known."""

    @property
    def seq(self) -> int: ...
    async def committed(self) -> None:
        """Wait until both nodes will carry it out. Raises NotServing; then it isn't known whether they will."""
        ...


class Namespace:
    """Begun when everything that was ever proposed is in the catalogue, and used while this node leads."""

    def __init__(self, kv: Readable, propose: Callable[[Change], Proposal]) -> None:
        """`propose` puts a change behind all others in the log; it raises NotServing."""
        self._kv, self._propose = kv, propose
        self._changes = Changes()
        self._proposed: deque[tuple[Proposal, list[Cell]]] = deque()  # with what each changes
        self._latest: dict[Cell, Proposal] = {}  # the last one that changes a row

    def look(self, look: Callable[[KeyValues], T]) -> T:
        with self._kv.read() as txn:
            return look(self._over(txn))

    def change(self, change: Change) -> tuple[Applied, Proposal]:
        """Decide and propose. Raises FileRefused as the system call would, NotServing. Who begins drops the orphans:
        nobody has them open any more."""
        fresh = Changes()
        with self._kv.read() as txn:
            applied = apply(Overlay(fresh, self._over(txn)), change)
        proposal = self._propose(change)
        for cell, value in fresh.rows.items():
            self._changes.set(*cell, value)
            self._latest[cell] = proposal
        self._proposed.append((proposal, list(fresh.rows)))
        return applied, proposal

    def _over(self, txn: Transaction) -> Overlay:
        """What the snapshot has is forgotten here."""
        applied = int(meta(txn, "applied", 0))
        while self._proposed and 0 < self._proposed[0][0].seq <= applied:
            proposal, cells = self._proposed.popleft()
            for cell in cells:
                if self._latest[cell] is proposal:
                    del self._latest[cell]
                    self._changes.forget(*cell)
        return Overlay(self._changes, txn)

    @property
    def behind(self) -> int:
        """Changes that aren't known to be in the catalogue yet."""
        return len(self._proposed)

    @property
    def waiting(self) -> int:
        """Rows that are changed and not in the catalogue yet."""
        return len(self._latest)
