"""The catalogue that is replaced, as far as it can be read."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import lmdb
import msgspec

from storage.state import instances
from storage.state.catalogue import TABLES
from storage.state.file_images import is_of_file
from storage.state.model import Put, decode_leaving

OLD_MAP_BYTES: Final = 1 << 40


class Old:
    """The catalogue that is replaced, as far as it can be read."""

    def __init__(self, path: Path | None) -> None:
        self._env: lmdb.Environment | None = None
        if path is not None and (path / "data.mdb").exists():
            with contextlib.suppress(lmdb.Error, OSError):
                self._env = lmdb.open(
                    str(path), map_size=OLD_MAP_BYTES, max_dbs=len(TABLES), readonly=True, lock=False, create=False
                )

    @property
    def known(self) -> bool:
        return self._env is not None

    def _get(self, table: str, key: bytes) -> bytes | None:
        if self._env is None:
            return None
        try:
            database = self._env.open_db(table.encode(), create=False)
            with self._env.begin(database) as txn:
                value: bytes | None = txn.get(key)
            return value
        except lmdb.Error:
            return None

    def put(self, sop_instance: str) -> Put | None:
        """The record of an instance of the archive."""
        key = instances.key_of(sop_instance)
        with contextlib.suppress(Exception):  # whatever a damaged row leads to: then it isn't known
            if (raw := self._get("instances", key)) is not None:
                row = instances.decode(key, raw, lambda number: self._get("base", number))
                return None if is_of_file(row.seq) else row.put
            if (raw := self._get("instance", sop_instance.encode())) is not None:
                return instances.decode_old(raw).put
        return None

    def is_deleted(self, sop_instance: str) -> bool:
        return self._get("tombstone", sop_instance.encode()) is not None

    def volume_paths(self) -> list[Path]:
        """Folders of the volumes that were added while the gateway ran."""
        raw = self._get("meta", b"volume_paths")
        with contextlib.suppress(msgspec.MsgspecError, TypeError):
            return [Path(path) for path in msgspec.msgpack.decode(raw)] if raw is not None else []
        return []

    def rows(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        """As many as can be read."""
        if self._env is None:
            return
        try:
            database = self._env.open_db(table.encode(), create=False)
            with self._env.begin(database) as txn, txn.cursor() as cursor:
                yield from cursor
        except lmdb.Error:
            return

    @property
    def applied(self) -> int:
        """The last entry of its log that it shows."""
        return self._number("applied")

    @property
    def checkpoint(self) -> int:
        """Up to this entry of its log the volumes had everything."""
        return self._number("checkpoint")

    @property
    def log(self) -> str:
        """Which log is its own, "" if that isn't known."""
        raw = self._get("meta", b"log")
        with contextlib.suppress(msgspec.MsgspecError):
            return str(msgspec.msgpack.decode(raw)) if raw is not None else ""
        return ""

    def _number(self, fact: str) -> int:
        raw = self._get("meta", fact.encode())
        with contextlib.suppress(msgspec.MsgspecError, TypeError, ValueError):
            return int(msgspec.msgpack.decode(raw)) if raw is not None else 0
        return 0

    def leaving(self) -> set[tuple[str, str]]:
        """(volume, file) of what is on its way out."""
        found = set()
        for _, value in self.rows("leaving"):
            with contextlib.suppress(Exception):
                location = decode_leaving(value).location
                found |= {(location.volume, location.spool), (location.volume, location.path)}
        return found

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
