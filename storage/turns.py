"""Whose turn it is to do the journal's work: a thread that a disk holds is left behind, and another one goes on."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from storage.objects.volumes import Volumes


class LeftBehind(Exception):
    """This thread was held by a disk for so long that another one does its work."""


class Turns:
    """`now` is the number of the thread whose turn it is. Each thread notes what it is at under its own number, so that
    one that was left behind can't hide what holds its successor."""

    def __init__(self, volumes: Volumes, clock: Callable[[], float]) -> None:
        self.now = 0
        self._volumes, self._clock = volumes, clock
        self._gate = threading.Lock()  # also held while a batch is committed: its thread isn't left behind then
        self._at: dict[int, tuple[str, float]] = {}  # turn -> (volume, "" for the state folder; since when)

    # -- in the thread -----------------------------------------------------------------------------------------

    def at(self, turn: int, volume_id: str) -> None:
        """This is what the thread waits for from here on. Raises LeftBehind."""
        with self._gate:
            self._note(turn, volume_id)

    def _note(self, turn: int, volume_id: str) -> None:
        self.check(turn)
        self._at[turn] = (volume_id, self._clock())

    def done(self, turn: int) -> None:
        """It waits for no disk any more."""
        self._at.pop(turn, None)

    def check(self, turn: int, volume_id: str = "", error: Exception | None = None) -> None:
        """Go no further in a thread that was left behind. What its disk said in the end counts all the same: nobody
        will be told of that error again. Raises LeftBehind."""
        if turn != self.now:
            self._at.pop(turn, None)
            if isinstance(error, OSError):
                self._volumes.failed(volume_id, error)
            raise LeftBehind

    @contextmanager
    def committing(self, turn: int) -> Iterator[None]:
        """The disk of the state folder has it; there is no other one to go on with. Raises LeftBehind."""
        with self._gate:
            self._note(turn, "")
            yield

    # -- on the event loop -------------------------------------------------------------------------------------

    def held(self, seconds: float) -> str | None:
        """What has held the thread for so long: a volume, "" for the disk of the state folder; None for nothing."""
        at = self._at.get(self.now)
        return at[0] if at is not None and self._clock() - at[1] > seconds else None

    def next(self, seconds: float) -> bool:
        """Leave the thread behind. Returns False if it went on just now, or is committing at this moment."""
        if not self._gate.acquire(blocking=False):
            return False
        try:
            if not self.held(seconds):
                return False
            self.now += 1
        finally:
            self._gate.release()
        return True
