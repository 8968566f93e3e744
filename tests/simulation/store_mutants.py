"""Deliberate bugs in the store. The simulation must catch each of them; that shows that its checks see something."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from storage import parts
from storage.journal import Journal
from storage.objects.incoming import Incoming
from storage.replication import follower
from storage.state import changes
from storage.state.kv import Transaction
from storage.state.model import Delete, Entry, Void, decode_entry, encode
from tests.simulation.mutants import AckBeforePeer, RollForwardSkipped, ShrinkWithoutCompare


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def directory_not_synced() -> contextlib.AbstractContextManager[None]:
    """The bytes are synced, the name in the spool folder isn't."""
    return replaced(Journal, "_sync_names", lambda self, work, turn: None)


def log_entry_before_bytes() -> contextlib.AbstractContextManager[None]:
    """The entry is written when the bytes were handed to the disk, not when they are durable."""

    def write(self: Incoming, queue: list[bytearray | bytes], generation: int, digest: bool = True) -> None:
        if queue or self._spooled is None:
            self._write(queue, generation, digest)

    return replaced(Incoming, "_write_and_finish", write)


def tombstone_dropped_early() -> contextlib.AbstractContextManager[None]:
    """A deletion is forgotten as soon as this node has carried it out."""
    apply: Callable[[Transaction, int, Delete], int] = changes.apply_delete

    def forget(txn: Transaction, seq: int, delete: Delete) -> int:
        grown = apply(txn, seq, delete)
        entry = decode_entry(txn.get("log", changes.seq_key(seq)) or b"")
        txn.put("log", changes.seq_key(seq), encode(Entry(entry.epoch, seq, Void())))
        return grown

    return replaced(changes, "apply_delete", forget)


def heal_from_the_worse_copy() -> contextlib.AbstractContextManager[None]:
    """What comes from the peer is taken without a look at its digest."""
    return replaced(follower, "_fits", lambda incoming, put: True)


def ack_before_the_peer() -> contextlib.AbstractContextManager[None]:
    return replaced(parts, "Replica", AckBeforePeer.core_class)


def roll_forward_skipped() -> contextlib.AbstractContextManager[None]:
    return replaced(parts, "Replica", RollForwardSkipped.core_class)


def shrink_without_the_compare() -> contextlib.AbstractContextManager[None]:
    return replaced(parts, "Replica", ShrinkWithoutCompare.core_class)


MUTANTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    mutant.__name__: mutant
    for mutant in (
        directory_not_synced,
        log_entry_before_bytes,
        ack_before_the_peer,
        tombstone_dropped_early,
        roll_forward_skipped,
        shrink_without_the_compare,
        heal_from_the_worse_copy,
    )
}
