"""Entries between their proposal (or commit) and their publication in the catalogue."""

import asyncio
from dataclasses import dataclass

from storage.state.model import Delete, Entry, Location, Put


@dataclass
class Pending:
    """`location` is known once the bytes are durable here, `waiting` while somebody waits for the commit."""

    entry: Entry
    location: Location | None
    stream: int = 0
    waiting: "asyncio.Future[None] | None" = None


class Pendings:
    """By seq, and by SOP Instance UID: a repeated UID must find what isn't in the catalogue yet."""

    def __init__(self) -> None:
        self._by_seq: dict[int, Pending] = {}
        self._by_uid: dict[str, int] = {}

    def add(self, pending: Pending) -> None:
        self._by_seq[pending.entry.seq] = pending
        if isinstance(pending.entry.operation, Put):
            self._by_uid[pending.entry.operation.sop_instance] = pending.entry.seq

    def get(self, seq: int) -> Pending | None:
        return self._by_seq.get(seq)

    def deletes(self, put: Put, seq: int) -> bool:
        """A deletion that names this instance, stored by entry `seq`, is on its way."""
        return any(
            pending.entry.seq > seq
            and isinstance(deletion := pending.entry.operation, Delete)
            and deletion.study == put.study
            and deletion.series in ("", put.series)
            and deletion.sop_instance in ("", put.sop_instance)
            for pending in self._by_seq.values()
        )

    def find(self, sop_instance: str) -> Pending | None:
        return self._by_seq.get(self._by_uid.get(sop_instance, 0))

    def committed(self, upto: int) -> None:
        """Tell those who wait."""
        for pending in self._waiting():
            if pending.entry.seq <= upto and pending.waiting and not pending.waiting.done():
                pending.waiting.set_result(None)

    def fail(self, error: Exception) -> None:
        """The outcome is unknown to whoever still waits."""
        for pending in self._waiting():
            if pending.waiting and not pending.waiting.done():
                pending.waiting.set_exception(error)

    def locations(self) -> list[Location | None]:
        return [pending.location for pending in self._by_seq.values()]

    def _waiting(self) -> list[Pending]:
        return [pending for pending in self._by_seq.values() if pending.waiting and not pending.waiting.done()]

    def forget_upto(self, seq: int) -> None:
        """These are in the catalogue now."""
        self._forget([known for known in self._by_seq if known <= seq])

    def forget_after(self, seq: int) -> list[int]:
        """These are no longer in the log. Returns the streams that carried their bytes."""
        dropped = [known for known in self._by_seq if known > seq]
        streams = [self._by_seq[known].stream for known in dropped]
        self._forget(dropped)
        return streams

    def _forget(self, seqs: list[int]) -> None:
        for seq in seqs:
            operation = self._by_seq.pop(seq).entry.operation
            if isinstance(operation, Put) and self._by_uid.get(operation.sop_instance) == seq:
                del self._by_uid[operation.sop_instance]
