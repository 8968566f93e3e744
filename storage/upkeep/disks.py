"""Looks at the disks from outside: which answers, how much room it has, and whether it is ours.

A disk that doesn't answer within `hang_s` counts as one that fails: it goes out of service, what was being written to
it goes elsewhere from memory or is refused, and the journal's thread is left behind. One that answers again comes back
by itself; one that doesn't within `give_up_s` is given up, and its copies are made again.

Each look is a job of its own in threads of its own, one at a time for a disk: none holds up another. Time counts from
when a thread comes to a job: what waits for threads that another disk holds says nothing of its own.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from storage.objects.volumes import Slot, Volumes
from storage.workers import Threads

log = structlog.get_logger()

TICK_S: Final = 0.25
CHECK_S: Final = 10.0
LOOK_THREADS: Final = 2
CHECK_OUT_S: Final = 1.0  # of a disk that is hung or away


class DiskWatch:
    def __init__(
        self,
        volumes: Volumes,
        workers: Threads,
        looking: Threads,
        *,
        clock: Callable[[], float],
        hang_s: float,
        give_up_s: float,
        journal_hangs: Callable[[float], str | None],
        leave_thread: Callable[[float], None],
        checked: Callable[[], None],
    ) -> None:
        """`looking`: threads for the looks at disks, `workers`: those for all else. `journal_hangs(seconds)`: what has
        held the journal so long, see `Journal.hangs`; `leave_thread(seconds)` has it go on without; `checked()` is
        called when the disks were looked at."""
        self._volumes, self._workers, self._looking, self._clock = volumes, workers, looking, clock
        self._hang_s, self._give_up_s = hang_s, give_up_s
        self._journal_hangs, self._leave_thread, self._checked = journal_hangs, leave_thread, checked
        self._looks: dict[int, tuple[Slot, float | None]] = {}  # to be done: slot, and since when a thread is at it
        self._checked_at: dict[int, float] = {}
        self.state_hangs = False  # the disk of catalogue and log doesn't answer: nothing can be kept here

    async def run(self) -> None:
        while True:
            self.tick()
            await asyncio.sleep(TICK_S)

    def tick(self) -> None:
        now = self._clock()
        for slot in self._volumes.to_check():
            self._look(slot, now)
        for slot, since in list(self._looks.values()):
            if since is not None and now - since > self._hang_s and slot.volume:
                self._volumes.hangs(slot.volume.id)
        self._look_at_writers()
        held_by = self._journal_hangs(self._hang_s)
        if held_by:
            self._volumes.hangs(held_by)
            self._leave_thread(self._hang_s)
        self._note_state(held_by == "")
        self._workers.reinforce(self._hang_s)
        self._looking.reinforce(self._hang_s)
        for volume_id, since in self._volumes.out().items():
            if now - since > self._give_up_s:
                self._volumes.give_up(volume_id)

    def _note_state(self, hangs: bool) -> None:
        if hangs and not self.state_hangs:
            log.critical("state.hangs", why="the disk of the state folder doesn't answer")
        self.state_hangs = hangs

    def _look(self, slot: Slot, now: float) -> None:
        key = id(slot)
        if key in self._looks:
            return
        out = slot.hung or slot.away
        due = now - self._checked_at.get(key, float("-inf")) > (CHECK_OUT_S if out else CHECK_S)
        if due:
            self._checked_at[key] = now
        elif out or now < slot.looked_at:
            return
        self._looks[key] = (slot, None)

        def work() -> None:
            self._looks[key] = (slot, self._clock())
            if due:
                self._volumes.check_one(slot)
            self._volumes.measure(slot)

        def done(job: "asyncio.Future[None]") -> None:
            self._looks.pop(key, None)
            if not job.cancelled() and (error := job.exception()):
                log.error("disk.check_failed", error=type(error).__name__)
            if due:
                self._checked()

        self._looking.run(work).add_done_callback(done)

    def _look_at_writers(self) -> None:
        """What is on its way to a disk; once that is known to hang, all that waits for it leaves it."""
        now = asyncio.get_running_loop().time()
        coming = list(self._volumes.on_their_way)
        for incoming in coming:
            if incoming.stuck_for(now) > self._hang_s:
                self._volumes.hangs(incoming.volume.id)
        out = self._volumes.out()
        for incoming in coming:
            if incoming.waits and incoming.volume.id in out:
                incoming.leave_disk()
