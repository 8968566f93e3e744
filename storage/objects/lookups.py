"""What has to be known of the catalogue while objects come in, asked in a thread: a page of it may have to come from
the disk, and the event loop waits for no disk.
"""

import asyncio
from collections import OrderedDict
from functools import partial
from typing import Final

from storage.objects.incoming import Incoming
from storage.objects.volume import Volume
from storage.objects.volumes import Volumes
from storage.state.catalogue import Catalogue
from storage.workers import Threads, within

# The last ones of a UID: what differs only there lies on the same pages, or nearly.
NEAR_CHARS: Final = 3
NEAR_MAX: Final = 4096  # that are remembered


class Lookups:
    def __init__(self, catalogue: Catalogue, volumes: Volumes, threads: Threads, hang_s: float) -> None:
        self._catalogue, self._volumes, self._threads, self._hang_s = catalogue, volumes, threads, hang_s
        self._near: OrderedDict[str, None] = OrderedDict()

    async def warm(self, sop_instance: str) -> None:
        """Have the pages that say whether this instance is stored in memory. Raises OSError where the disk hangs."""
        near = sop_instance[:-NEAR_CHARS]
        if near in self._near:
            self._near.move_to_end(near)
            return
        await within(self._threads.run(self._catalogue.instance, sop_instance), self._hang_s)
        self._near[near] = None
        if len(self._near) > NEAR_MAX:
            self._near.popitem(last=False)

    def place(self, incoming: Incoming, study: str) -> None:
        """Have an object go where the rest of its study lies, if nothing of it was written yet; at once or in a moment.
        Raises NoRoom."""
        if incoming.placed:
            return
        if self._volumes.knows(study):
            incoming.volume = self._volumes.place(study)
        else:
            incoming.hold()
            timer = asyncio.get_running_loop().call_later(self._hang_s, incoming.go_to, None)
            self._look(study).add_done_callback(partial(self._found, incoming, timer))

    async def look_for(self, study: str) -> None:
        """Know where a study lies. Raises NoRoom, OSError if the disk of the catalogue hangs."""
        if not self._volumes.knows(study):
            await within(self._look(study), self._hang_s)

    def _look(self, study: str) -> "asyncio.Future[Volume]":
        return self._threads.run(self._volumes.place, study, self._catalogue.volume_of)

    def _found(self, incoming: Incoming, timer: asyncio.TimerHandle, job: "asyncio.Future[Volume]") -> None:
        timer.cancel()
        failed = job.cancelled() or job.exception()  # it stays where it was to go
        incoming.go_to(None if failed else job.result())
