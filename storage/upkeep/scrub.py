"""Reads every copy of this node again and again and checks it against its digest; looks for files that don't belong.

The pace is that of `scrub_days` for all there is, and images that come in go first. What is bad or gone is set aside
and made again from the peer (`Healing.examine`). A file in the tree that the catalogue doesn't name goes to quarantine.
Of the share's files those are read that the catalogue has as instances; the share makes bad copies again.
"""

import asyncio
from collections.abc import Callable
from itertools import islice
from typing import Any, Final

import structlog

from storage.journal import Journal
from storage.objects.copies import Copies
from storage.objects.volume import set_aside
from storage.objects.volumes import Volumes
from storage.state import file_images
from storage.state.catalogue import Catalogue
from storage.state.file_images import is_of_file
from storage.state.model import Put
from storage.upkeep.healing import Healing
from storage.workers import Threads

log = structlog.get_logger()

BATCH: Final = 64
DAY_S: Final = 86400.0
WRITTEN_S: Final = 5.0
BUSY_WAIT_S: Final = 0.2
HEALING_LOOK_S: Final = 0.5
HEALING_LOOKS: Final = 60
PAUSE_S_MAX: Final = 60.0
REST_S: Final = 3600.0  # between two rounds at least


class Scrub:
    def __init__(
        self,
        catalogue: Catalogue,
        volumes: Volumes,
        journal: Journal,
        copies: Copies,
        healing: Healing,
        workers: Threads,
        days: float,
        files_lost: Callable[[list[int]], object],
    ) -> None:
        """`files_lost(inode numbers)`: this node's copies of these aren't good."""
        self._catalogue, self._volumes, self._journal = catalogue, volumes, journal
        self._copies, self._healing, self._workers = copies, healing, workers
        self._days, self._files_lost = days, files_lost
        self.checked = 0
        self.bad = 0
        self.at = int(catalogue.meta("scrub_at", 0))

    async def run(self) -> None:
        """Round after round, for ever; goes on where it was after a restart."""
        if not self._days:
            return
        while True:
            await self._round()
            await asyncio.sleep(REST_S)

    async def _round(self) -> None:
        while found := await self._batch(self.at + 1):
            total_bytes = max(1, int(self._catalogue.meta("bytes", 0)))
            files = max(1, await self._workers.run(self._count_files))
            for seq in found:
                await self._journal.quiet(BUSY_WAIT_S)
                length, _ = await self._check(seq)
                part = 1 / files if is_of_file(seq) else length / total_bytes
                await asyncio.sleep(min(PAUSE_S_MAX, self._days * DAY_S * part))
            self.at = found[-1]
            self._journal.note(scrub_at=self.at)
        self.at = 0
        self._journal.note(scrub_at=0)
        await self.strangers()

    async def now(self, study: str, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Check everything, or one study, at once; images that come in still go first."""
        total = await self._workers.run(self._catalogue.counts)
        start = checked = bad = 0
        while found := await self._batch(start):
            for seq in found:
                if study and not await self._workers.run(self._is_of, seq, study):
                    continue
                await self._journal.quiet(BUSY_WAIT_S)
                _, good = await self._check(seq)
                checked, bad = checked + (good is not None), bad + (good is False)
            start = found[-1] + 1
            progress(checked, total["instances"])
        for _ in range(HEALING_LOOKS):  # what was just found to be missing might be what lies in another place
            if study or not await self._workers.run(self._catching_up):
                break
            await asyncio.sleep(HEALING_LOOK_S)
        strangers = 0 if study else await self.strangers()
        return {"checked": checked, "bad": bad, "strangers": strangers}

    def _is_of(self, seq: int, study: str) -> bool:
        if is_of_file(seq):
            found = self._copies.find(seq)
            return found is not None and found[2].study == study
        entry = self._copies.entry(seq)
        return entry is not None and isinstance(entry.operation, Put) and entry.operation.study == study

    async def _batch(self, start: int) -> list[int]:
        """Numbers of copies from one on: the archive's, then those of files."""
        return await self._workers.run(self._numbers, start)

    def _numbers(self, start: int) -> list[int]:
        found = [] if is_of_file(start) else [seq for seq, _ in self._catalogue.locations(start, BATCH)]
        if found:
            return found
        with self._catalogue.kv.read() as txn:
            return list(islice(file_images.numbers(txn, start), BATCH))

    def _count_files(self) -> int:
        with self._catalogue.kv.read() as txn:
            return file_images.count_listed(txn)

    async def _check(self, seq: int) -> tuple[int, bool | None]:
        """Returns the bytes that were read, and whether they were good; None: there was nothing to be checked."""
        if is_of_file(seq):
            return await self.check_file(seq)
        entry = await self._workers.run(self._copies.entry, seq)
        if entry is None or not isinstance(entry.operation, Put):
            return 0, None
        self.checked += 1
        bad = not await self._healing.examine(seq) and await self._workers.run(self._copies.entry, seq) == entry
        self.bad += bad
        return entry.operation.length, not bad

    async def check_file(self, seq: int) -> tuple[int, bool | None]:
        """Of the share, which the catalogue has by this number. A bad copy is reported if it is bad once more when all
        is known that the file may have had done to it. Returns what `_check` does."""
        found = await self._workers.run(self._copies.find, seq)
        if found is None:
            return 0, None
        self.checked += 1
        for wait_s in (0.0, WRITTEN_S):  # a standby may have the bytes of a change before it knows of it
            await asyncio.sleep(wait_s)
            if await self._workers.run(self._is_good, seq):
                return found[2].length, True
        number = await self._workers.run(self._number, seq)
        if number is None or await self._workers.run(self._copies.find, seq) != found:
            return found[2].length, True  # it was written to, or moved, meanwhile
        self.bad += 1
        log.warning("scrub.file_bad", inode=number)
        self._files_lost([number])
        return found[2].length, False

    def _number(self, seq: int) -> int | None:
        with self._catalogue.kv.read() as txn:
            return file_images.file_of(txn, seq)

    def _is_good(self, seq: int) -> bool:
        try:
            return self._copies.good(seq) is not False
        except OSError:
            return False

    async def strangers(self) -> int:
        """Set aside files in the trees that the catalogue doesn't name. Returns how many."""
        return await self._workers.run(self._set_strangers_aside)

    def _set_strangers_aside(self) -> int:
        count = 0
        for volume in self._volumes:
            try:
                for path in volume.archived():
                    if self._catching_up():
                        return count  # such files may be taken over as copies that are missing
                    if self._is_stranger(volume.id, path):
                        set_aside(volume, f"archive/{path}", "not in the catalogue", {})
                        log.warning("scrub.stranger", volume=volume.id)
                        count += 1
            except OSError as error:
                log.error("scrub.failed", volume=volume.id, error=type(error).__name__)
        return count

    def _catching_up(self) -> bool:
        """What the other node knows may still be missing here, or all of it."""
        lacks = not self._catalogue.epochs.last[1] or bool(self._catalogue.missing(0, 1))
        return lacks or not self._catalogue.meta("whole", True)

    def _is_stranger(self, volume_id: str, path: str) -> bool:
        """A file's record comes before the file, and goes before it; so what isn't named now doesn't belong here."""
        uid = path.rpartition("/")[2].removesuffix(".dcm").partition("~")[0]
        instance = self._catalogue.instance(uid)
        location = self._catalogue.location(instance.seq) if instance else None
        if location and (location.volume, location.path) == (volume_id, path):
            return False
        return (volume_id, path) not in self._catalogue.leaving_paths()
