"""Which volume takes a study: the one where the rest of it lies, else the one that has least to do for its room.

As many studies come at once as modalities send. Each new one goes where the fewest are being written now; a volume with
much room counts for up to `WEIGHT_MAX` of the usual ones: so all disks work, and one that was put in just now fills up
sooner than the others and isn't the only one that works.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from statistics import median
from typing import Final

ACTIVE_S: Final = 60.0  # a study that nothing came of for so long isn't being written any more
WEIGHT_MIN, WEIGHT_MAX = 0.25, 2.0
FULL_SHARE, FULL_BYTES = 1 / 16, 16 << 30  # with less room than both, of the one with the most: no new study
STUDIES_MAX: Final = 4096  # that are remembered

LiesOn = Callable[[str], str]


class Studies:
    """Where studies are, by volume UUID. Any thread may use it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._gate = threading.Lock()
        self._known: OrderedDict[str, tuple[str, float, bool]] = OrderedDict()  # volume, last used, looked up

    def known(self, study: str) -> str:
        """Where it was last written, "" if that isn't known."""
        with self._gate:
            return self._known.get(study, ("", 0.0, False))[0]

    def is_looked_up(self, study: str) -> bool:
        """The catalogue was asked where it lies."""
        with self._gate:
            return self._known.get(study, ("", 0.0, False))[2]

    def volume_of(self, study: str, lies_on: LiesOn | None) -> str:
        """ "" if it isn't known. `lies_on(study)` says what the catalogue knows; it is asked once."""
        with self._gate:
            volume, _, looked_up = self._known.get(study, ("", 0.0, False))
        if looked_up or lies_on is None:
            return volume
        return lies_on(study) or volume

    def note(self, study: str, volume: str, *, looked_up: bool) -> None:
        """Something of a study is written there now."""
        with self._gate:
            before = self._known.pop(study, None)
            self._known[study] = volume, self._clock(), looked_up or (before is not None and before[2])
            if len(self._known) > STUDIES_MAX:
                self._known.popitem(last=False)

    def active(self) -> dict[str, int]:
        """How many studies are being written on each volume."""
        found: dict[str, int] = {}
        until = self._clock() - ACTIVE_S
        with self._gate:
            for volume, used, _ in reversed(self._known.values()):  # the ones used last first
                if used < until:
                    break
                found[volume] = found.get(volume, 0) + 1
        return found


def least_loaded(free: Mapping[str, int], active: Mapping[str, int]) -> str:
    """Of these volumes, with their free bytes, the one for a new study; `free` isn't empty."""
    most = max(free.values())
    free = {volume: room for volume, room in free.items() if room >= min(most * FULL_SHARE, FULL_BYTES)}
    usual = median(free.values())

    def load(volume: str) -> tuple[float, int]:
        weight = min(WEIGHT_MAX, max(WEIGHT_MIN, free[volume] / usual if usual else 1.0))
        return (active.get(volume, 0) + 1) / weight, -free[volume]

    return min(free, key=load)
