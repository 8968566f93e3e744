"""The rows for another process than the gateway, which only reads them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.state.catalogue import TABLES
from storage.state.kv import LmdbReader, Transaction
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
    def __init__(self) -> None:
        self._reopened = Reopened()
        super().__init__(self._reopened)

    def use(self, folder: str, generation: int) -> None:
        """From the next read on, see `Store.for_other_processes`. Raises OSError."""
        self._reopened.use(folder, generation)
