"""Empties a volume: copies of instances and of the share's files go to the other volumes of the node.

Instances are copied by the node itself; copies of files by the share's writer, which may be changing them, on whichever
node it is. What is left behind in either case is removed as everything is that the rows don't name any more.
"""

import asyncio
import errno
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

from storage.files.local import copies_in
from storage.files.mirror import Mirror
from storage.journal import Journal
from storage.objects.blob_store import READ_BYTES
from storage.objects.copies import Copies
from storage.objects.incoming import Incoming
from storage.objects.volume import Volume, VolumeOffline
from storage.objects.volumes import Volumes
from storage.state import file_rows
from storage.state.catalogue import Catalogue
from storage.upkeep.healing import Healing
from storage.upkeep.share_copies import Copy
from storage.workers import Threads, within

BATCH: Final = 16  # instances
REST_S: Final = 1.0  # at most between two batches, while images come in
FILES: Final = 500  # asked for at once
LOOK_S: Final = 0.5
SCAN_S: Final = 600.0  # a disk that doesn't answer holds up nobody for ever
STUCK_S: Final = 300.0  # so long without one file that moves: a large one takes its time

Progress = Callable[[int, int], None]


class Draining:
    def __init__(
        self,
        catalogue: Catalogue,
        volumes: Volumes,
        journal: Journal,
        copies: Copies,
        healing: Healing,
        mirror: Mirror,
        disk: Threads,
        *,
        node: str,
    ) -> None:
        self._catalogue, self._volumes, self._journal = catalogue, volumes, journal
        self._copies, self._healing, self._mirror, self._disk, self._node = copies, healing, mirror, disk, node

    async def held(self, volume: Volume) -> int:
        """How many copies of instances lie on a volume."""
        counts = await self._disk.run(self._catalogue.copies_on)
        return counts.get(volume.id, 0)

    async def files_on(self, volume: Volume) -> list[Copy]:
        """The copies of files that lie on a volume and that the rows name. Raises OSError."""
        return await within(self._disk.run(self._files_on, volume), SCAN_S)

    def _files_on(self, volume: Volume) -> list[Copy]:
        _check(volume)
        found = copies_in(volume.path, self._catalogue.files_space())
        named: list[Copy] = []
        while page := list(islice(found, FILES)):
            named += self._named(page)
        _check(volume)
        return named

    def _named(self, copies: Iterable[Copy]) -> list[Copy]:
        with self._catalogue.kv.read() as txn:
            return [
                (number, generation)
                for number, generation in copies
                if not file_rows.is_gone(txn, number) and file_rows.generation(txn, number, self._node) == generation
            ]

    async def lacking(self) -> int:
        """How many files this node lacks its copy of."""
        return await self._disk.run(self._lacking)

    def _lacking(self) -> int:
        with self._catalogue.kv.read() as txn:
            return sum(node == self._node for _, node in file_rows.all_lacking(txn))

    async def instances(self, volume: Volume, progress: Progress) -> int:
        """Copy those that lie on a volume to others. Returns how many that were."""
        held, moved, done, start = await self.held(volume), 0, 0, 0
        while batch := await self._disk.run(self._catalogue.locations_on, volume.id, start, BATCH):
            found = {}
            for seq, _ in batch:
                incoming = await self._copy(seq, volume)
                if incoming:
                    found[seq] = incoming
            moved += len(await self._journal.move({seq: incoming.location for seq, incoming in found.items()}))
            start, done = batch[-1][0] + 1, done + len(batch)
            progress(done, max(held, done))
            await self._journal.quiet(REST_S)
        return moved

    async def _copy(self, seq: int, volume: Volume) -> Incoming | None:
        """A verified second copy on another volume of this node, None if the first is gone or no good."""
        found = await self._disk.run(self._copies.find, seq)
        if found is None or found[0] is not volume:
            return None
        _, name, put = found
        file = await self._disk.run(volume.open, name)
        try:
            incoming = Incoming(self._disk, self._volumes, self._volumes.choose(), file.read(put.offset))
            while block := await self._disk.run(file.read, READ_BYTES):
                incoming.feed_chunk(bytearray(block))
        finally:
            file.close()
        await incoming.finish()
        if incoming.digest != put.digest:
            await incoming.discard()
            await self._healing.examine(seq)
            return None
        return incoming

    async def files(self, volume: Volume, progress: Progress) -> tuple[int, str]:
        """Have the share's writer move those that lie on a volume. Returns how many that were, and why it ended: "" if
        none is left."""
        moved, here = 0, await self.files_on(volume)
        all_of_them = len(here)
        while here:
            page = here[:FILES]
            left, why = await self._moved(page)
            moved += len(page) - len(left)
            if why:
                return moved, why
            progress(moved, max(all_of_them, moved))
            here = here[FILES:] or await self.files_on(volume)
        return moved, ""

    async def _moved(self, page: list[Copy]) -> tuple[list[Copy], str]:
        """Returns which are still there, and why: "" if none is."""
        quiet_s = 0.0
        while quiet_s < STUCK_S:
            if not self._mirror.leave([number for number, _ in page]):
                return page, "the share isn't served now, on whichever node is primary"
            await asyncio.sleep(LOOK_S)
            left = await self._disk.run(self._named, page)
            if not left:
                return [], ""
            quiet_s = quiet_s + LOOK_S if len(left) == len(page) else 0.0
            page = left
        return page, "they can't be moved now; the log of `tandem mount` on the primary says why (share.not_moved)"


def _check(volume: Volume) -> None:
    """What isn't mounted isn't empty. Raises OSError."""
    try:
        volume.check()
    except VolumeOffline as error:
        raise OSError(errno.ENODEV, "the volume isn't mounted, or doesn't answer") from error
