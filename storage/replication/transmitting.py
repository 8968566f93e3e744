"""Sends entries to the follower, in order: those at hand at once, older ones once a thread has read them."""

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from storage.replication.effects import Transmit
from storage.replication.messages import Prepare
from storage.replication.peering import Peering
from storage.replication.pending import Pendings
from storage.replication.replica import Replica
from storage.state.catalogue import Catalogue
from storage.state.model import Entry, encode
from storage.workers import Threads

READ_AT_ONCE: Final = 64


class Transmitting:
    """`spawn(coroutine)` runs one; whatever it raises is fatal."""

    def __init__(
        self,
        core: Replica,
        peering: Peering,
        pendings: Pendings,
        catalogue: Catalogue,
        workers: Threads,
        spawn: Callable[[Any], None],
    ) -> None:
        self._core, self._peering, self._pendings = core, peering, pendings
        self._catalogue, self._workers, self._spawn = catalogue, workers, spawn
        self._waiting: deque[Transmit] = deque()  # the first one is being sent

    def send(self, effect: Transmit) -> None:
        if not self._waiting and all(self._pendings.get(seq) for seq in range(effect.first, effect.last + 1)):
            self._send(effect, effect.first, effect.last, {})
            return
        self._waiting.append(effect)
        if len(self._waiting) == 1:
            self._spawn(self._run())

    async def _run(self) -> None:
        while self._waiting:
            effect = self._waiting[0]
            for first in range(effect.first, effect.last + 1, READ_AT_ONCE):
                last = min(first + READ_AT_ONCE - 1, effect.last)
                old = [seq for seq in range(first, last + 1) if not self._pendings.get(seq)]
                read = await self._workers.run(self._read, old) if old and self._is_wanted(effect) else {}
                if not self._is_wanted(effect):
                    break
                self._send(effect, first, last, read)
            self._waiting.popleft()

    def _is_wanted(self, effect: Transmit) -> bool:
        """The session for which it was to be sent is still the one in force. If not, the rows may say less by now."""
        return self._core.leading and self._core.joined and self._core.session == effect.session

    def _read(self, seqs: list[int]) -> dict[int, Entry]:
        return {seq: self._catalogue.entry(seq) for seq in seqs}

    def _send(self, effect: Transmit, first: int, last: int, read: dict[int, Entry]) -> None:
        for seq in range(first, last + 1):
            kept = self._pendings.get(seq)
            entry = kept.entry if kept else read.get(seq) or self._catalogue.entry(seq)
            # A stream belongs to the link it was sent on; after a reconnect the follower doesn't know it and fetches.
            stream = kept.stream if kept else 0
            place = (self._core.epoch, effect.session, seq, entry.epoch)
            self._peering.send(Prepare(*place, effect.commit, encode(entry), stream))
