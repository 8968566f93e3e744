"""The rows for another process than the gateway, which only reads them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from storage.state import instances, places
from storage.state.catalogue import TABLES
from storage.state.entries import operation_of, seq_key, seq_of
from storage.state.kv import LmdbReader, Transaction
from storage.state.model import Location, Put
from storage.state.reader import Reader


class Reopened:
    """The catalogue's tables, also after another catalogue has taken the place of the one that was opened."""

    def __init__(self) -> None:
        self._opened: LmdbReader | None = None
        self._generation = -1

    def use(self, folder: str, generation: int) -> None:
        """From the next read on, see `Store.for_other_processes`. Raises OSError."""
        if generation == self._generation and self._opened is not None:
            return
        if self._opened is not None:
            self._opened.close()
        self._opened = None
        self._opened, self._generation = LmdbReader(Path(folder), TABLES), generation

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """Raises OSError."""
        if self._opened is None:
            raise OSError(0, "no catalogue is open")
        with self._opened.read() as txn:
            yield txn


class OtherProcess(Reader):
    """All that readers ask, and what the node's own copies are."""

    def __init__(self) -> None:
        self._reopened = Reopened()
        super().__init__(self._reopened)

    def use(self, folder: str, generation: int) -> None:
        """From the next read on, see `Store.for_other_processes`. Raises OSError."""
        self._reopened.use(folder, generation)

    def copies(self, start: int, limit: int) -> list[tuple[int, Put, Location | None]]:
        """(number, record, where this node's copy lies) of instances from number `start` on."""
        found: list[tuple[int, Put, Location | None]] = []
        with self._reopened.read() as txn:
            for seq in [seq_of(key) for key, _ in islice(txn.scan("kept", seq_key(start)), limit)]:
                put = operation_of(txn, seq)
                if isinstance(put, Put):
                    found.append((seq, put, places.get(txn, seq)))
        return found

    def series_there(self, named: Iterable[tuple[str, str]]) -> list[bool]:
        """Whether there are instances of each (study, series)."""
        with self._reopened.read() as txn:
            return [instances.number_of(txn, study, series) is not None for study, series in named]
