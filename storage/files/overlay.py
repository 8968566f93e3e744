"""Changes of rows that are to come, over the rows that are there."""

import bisect
from collections.abc import Iterator

from storage.state.kv import KeyValues


class Changes:
    """What some keys of each table are to be; None: removed."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, bytes], bytes | None] = {}
        self._keys: dict[str, list[bytes]] = {}

    def set(self, table: str, key: bytes, value: bytes | None) -> None:
        if (table, key) not in self.rows:
            bisect.insort(self._keys.setdefault(table, []), key)
        self.rows[table, key] = value

    def forget(self, table: str, key: bytes) -> None:
        del self.rows[table, key]
        keys = self._keys[table]
        del keys[bisect.bisect_left(keys, key)]

    def scan(self, table: str, start: bytes) -> Iterator[tuple[bytes, bytes | None]]:
        keys = self._keys.get(table, [])
        for at in range(bisect.bisect_left(keys, start), len(keys)):
            yield keys[at], self.rows[table, keys[at]]


class Overlay:
    """The rows as they will be: `changes` over `below`. What is written here goes to `changes`."""

    def __init__(self, changes: Changes, below: KeyValues) -> None:
        self._changes, self._below = changes, below

    def get(self, table: str, key: bytes) -> bytes | None:
        if (table, key) in self._changes.rows:
            return self._changes.rows[table, key]
        return self._below.get(table, key)

    def put(self, table: str, key: bytes, value: bytes) -> None:
        self._changes.set(table, key, value)

    def delete(self, table: str, key: bytes) -> bool:
        there = self.get(table, key) is not None
        if there:
            self._changes.set(table, key, None)
        return there

    def scan(self, table: str, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        below, changed = self._below.scan(table, start), self._changes.scan(table, start)
        old, new = next(below, None), next(changed, None)
        while old is not None or new is not None:
            if new is None or (old is not None and old[0] < new[0]):
                assert old is not None
                yield old
                old = next(below, None)
                continue
            if old is not None and old[0] == new[0]:
                old = next(below, None)
            if new[1] is not None:
                yield new[0], new[1]
            new = next(changed, None)
