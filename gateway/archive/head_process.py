"""The process that keeps heads: reads the copies that have none, and forgets what is there no more.

    python -m gateway.archive.head_process

["keep", Task], ["prune", Task] and ["check", Task] are a moment's work each, and answered with a Done.
"""

import resource
import time
from functools import lru_cache
from pathlib import Path
from typing import Final

import msgspec

from conf.telling import place_of
from gateway.dicom.heads import ALL, Odd, head_of
from gateway.workers.process import Answer, Pipe, confine, serve
from storage.heads import DIGEST_BYTES, FOLDER, Keeper, beginning
from storage.state.model import Kept, Location, Put
from storage.state.other_process import OtherProcess

MEMORY_BYTES_MAX: Final = 1 << 30  # without what LMDB maps
SLICE_S: Final = 0.5
NOTHING: Final = Kept(b"", (ALL,))


class Task(msgspec.Struct, frozen=True, array_like=True):
    """`catalogue`: see `Store.for_other_processes`; `volumes`: see `Store.usable_volumes`. `start`: the number of the
    first instance, 0 for what is newer than all that have one; `after`: the key of a series; `rows` are looked at, and
    `most` heads made, in one go."""

    catalogue: tuple[str, int]
    volumes: list[tuple[str, str]]
    start: int = 0
    after: bytes = b""
    rows: int = 2000
    most: int = 500


class Done(msgspec.Struct, frozen=True, array_like=True):
    """`next`: where to go on, 0 at the end; `after`: likewise, b"" at the end."""

    next: int
    after: bytes
    kept: int
    gone: int
    took_s: float


class Keeping:
    def __init__(self) -> None:
        self._rows = OtherProcess()
        self._keeper: Keeper | None = None

    def do(self, job: bytes) -> Answer:
        verb, given = msgspec.msgpack.decode(job)
        try:
            task = msgspec.convert(given, Task)
            self._rows.use(*task.catalogue)
            if self._keeper is None:
                self._keeper = Keeper(Path(task.catalogue[0]).parent / FOLDER)
            begun = time.monotonic()
            done = {"keep": self._keep, "prune": self._prune, "check": self._check}[verb](self._keeper, task)
            return ["ok", msgspec.structs.replace(done, took_s=time.monotonic() - begun)]
        except OSError as error:
            return ["error", "cannot", error.strerror or "the disk failed"]
        except Exception as error:  # whatever a strange file leads to
            return ["error", "failed", place_of(error)]

    def _keep(self, keeper: Keeper, task: Task) -> Done:
        """From `start` on: heads for those that have none, none for those that aren't there."""
        start = task.start or keeper.last + 1
        there = self._rows.copies(start, task.rows)
        end = there[-1][0] if len(there) == task.rows else None  # of what was looked at
        have = {seq: (digest, first) for seq, digest, first in keeper.said(start, 2 * task.rows)}
        first_of = lru_cache(maxsize=16)(keeper.first_of_series)
        lost = have.keys() - {seq for seq, _, _ in there}  # a first that goes is none for the others of its series
        known_to = max(have) if len(have) == 2 * task.rows else None
        volumes = {name: Path(folder) for name, folder in task.volumes}
        kept: list[tuple[int, Put, Kept]] = []
        until = time.monotonic() + SLICE_S
        for seq, put, location in there:
            if known_to is not None and seq > known_to:
                end = known_to
                break
            digest, first = have.pop(seq, (b"", 0))
            known = (0, first_of(put.study, put.series, put.transfer_syntax))
            if digest == put.digest[:DIGEST_BYTES] and first in known and first not in lost:
                continue
            head = _made(put, location, volumes)
            if head is not None:
                kept.append((seq, put, head))
            if len(kept) >= task.most or time.monotonic() > until:
                end = seq
                break
        gone = [seq for seq in have if end is None or seq <= end]
        if end is None:
            end = known_to
        if kept or gone:
            keeper.change(kept, gone)
        return Done(0 if end is None else end + 1, b"", len(kept), len(gone), 0.0)

    def _check(self, keeper: Keeper, task: Task) -> Done:
        """Read rows, of both tables; whatever is wrong with them is an error."""
        rows = keeper.said(task.start, task.rows) if task.start else []
        after = keeper.check(task.after, task.rows) if not task.start else b""
        return Done(rows[-1][0] + 1 if len(rows) == task.rows else 0, after, 0, 0, 0.0)

    def _prune(self, keeper: Keeper, task: Task) -> Done:
        """Forget the first of series that aren't there."""
        found = keeper.series(task.after, task.rows)
        there = self._rows.series_there((study, series) for _, study, series in found)
        gone = [key for (key, _, _), is_there in zip(found, there, strict=True) if not is_there]
        if gone:
            keeper.change((), (), gone)
        return Done(0, found[-1][0] + b"\0" if len(found) == task.rows else b"", 0, len(gone), 0.0)


def _made(put: Put, location: Location | None, volumes: dict[str, Path]) -> Kept | None:
    """None if the copy can't be read now, or isn't good."""
    volume = volumes.get(location.volume) if location else None
    raw = beginning(volume, location, put) if volume and location else None
    if raw is None:
        return None
    try:
        return head_of(raw, put.transfer_syntax, all_there=len(raw) == put.length - put.offset)
    except Odd:
        return NOTHING


def main() -> None:
    confine(resource.RLIMIT_DATA, MEMORY_BYTES_MAX)
    serve(Pipe(), Keeping().do)


if __name__ == "__main__":
    main()
