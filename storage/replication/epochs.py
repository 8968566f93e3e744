"""Which epoch wrote which part of a log: the table two nodes compare to find where their logs part."""

from bisect import bisect_left
from collections.abc import Iterable


class Epochs:
    """Ascending list of (epoch, last seq of that epoch in this log)."""

    def __init__(self, pairs: Iterable[tuple[int, int]] = ()) -> None:
        self._pairs: list[tuple[int, int]] = [(int(epoch), int(seq)) for epoch, seq in pairs]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        return tuple(self._pairs)

    @property
    def last(self) -> tuple[int, int]:
        """(epoch, seq) of the last entry, (0, 0) for an empty log."""
        return self._pairs[-1] if self._pairs else (0, 0)

    def epoch_of(self, seq: int) -> int:
        """Which epoch wrote this entry; raises KeyError for one that isn't in the log."""
        at = bisect_left(self._pairs, seq, key=lambda pair: pair[1])
        if seq < 1 or at == len(self._pairs):
            raise KeyError(seq)
        return self._pairs[at][0]

    def append(self, epoch: int, seq: int) -> None:
        last_epoch, last_seq = self.last
        if epoch < last_epoch or seq != last_seq + 1:
            raise ValueError(f"entry ({epoch}, {seq}) can't follow ({last_epoch}, {last_seq})")
        if epoch == last_epoch:
            self._pairs[-1] = (epoch, seq)
        else:
            self._pairs.append((epoch, seq))

    def truncate(self, seq: int) -> None:
        """Drop everything after `seq`."""
        while self._pairs and self._pairs[-1][1] > seq:
            epoch, _ = self._pairs.pop()
            before = self._pairs[-1][1] if self._pairs else 0
            if before < seq:
                self._pairs.append((epoch, seq))

    def common(self, other: "Epochs") -> int:
        """Highest seq up to which both logs are the same.

        An epoch has one writer and each log holds a prefix of what it wrote, on top of what that writer held
        before; so the newest epoch that both logs know decides.
        """
        mine = dict(self._pairs)
        for epoch, seq in reversed(other._pairs):
            if epoch in mine:
                return min(seq, mine[epoch])
        return 0
