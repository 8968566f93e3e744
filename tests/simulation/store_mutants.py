"""Deliberate bugs in the store. The simulation must catch each of them; that shows that its checks see something."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from storage import parts
from storage.appending import Appending
from storage.checkpoints import Checkpoints
from storage.files import mirroring
from storage.files.keeper import Keeper
from storage.files.mirroring import Mirroring
from storage.files.namespace import Namespace
from storage.files.opened import OpenFile
from storage.files.peer import Sync, Synced
from storage.files.share import Share
from storage.ingest import Proposal
from storage.log.log import Log
from storage.log.records import Record
from storage.log.segment import Segment
from storage.objects import reading
from storage.objects.incoming import Incoming
from storage.replication import follower
from storage.state import changes, entries, file_images, file_rows, files, transfer
from storage.state.catalogue import Catalogue
from storage.state.description import Description
from storage.state.file_model import Change, Flush, MarkDirty
from storage.state.kv import KeyValues, Transaction
from storage.state.model import Delete, IndexFile, Location
from storage.upkeep import recovery
from tests.simulation.machine import MemoryVolume
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
    return replaced(MemoryVolume, "sync_spool", lambda self: None)


def record_before_its_sync() -> contextlib.AbstractContextManager[None]:
    """An entry counts when its record was written, not when it is on the disk."""

    def write(self: Log, segment: Segment, out: bytearray, noted: Sequence[tuple[Record, bytes]]) -> None:
        if noted:
            segment.file.write(segment.end, out)
            for record, chain in noted:
                segment.note(record, chain)

    return replaced(Log, "_flush", write)


def checkpoint_before_its_sync() -> contextlib.AbstractContextManager[None]:
    """The log forgets bytes that no volume has for certain."""
    return replaced(Checkpoints, "_sync", lambda self, volume: True)


def trimmed_too_early() -> contextlib.AbstractContextManager[None]:
    """The log forgets what the last checkpoint doesn't cover as well."""

    async def trim(self: Appending, upto: int) -> None:
        await self._thread.run(self._log.trim, self._log.last[1])

    return replaced(Appending, "trim", trim)


def tail_not_replayed() -> contextlib.AbstractContextManager[None]:
    """What was logged and isn't in the catalogue when the power goes is forgotten."""

    def replay(catalogue: Catalogue, kept: Log) -> None:
        if kept.last[1] > catalogue.epochs.last[1]:
            kept.begin(kept.lineage, catalogue.epochs.pairs)

    return replaced(recovery, "_replay", replay)


def log_entry_before_bytes() -> contextlib.AbstractContextManager[None]:
    """The entry is written when the bytes were handed to the disk, not when they are durable."""

    def write(
        self: Incoming, queue: list[bytearray | bytes], attempt: int, digest: bool = True, sync: bool = True
    ) -> None:
        if queue or self._spooled is None:
            self._write(queue, attempt, digest)

    return replaced(Incoming, "_write_and_finish", write)


def tombstone_dropped_early() -> contextlib.AbstractContextManager[None]:
    """A deletion is forgotten as soon as this node has carried it out."""
    apply: Callable[[Transaction, int, Delete], int] = changes.apply_delete

    def forget(txn: Transaction, seq: int, delete: Delete) -> int:
        grown = apply(txn, seq, delete)
        entries.void(txn, seq)
        return grown

    return replaced(changes, "apply_delete", forget)


def heal_from_the_worse_copy() -> contextlib.AbstractContextManager[None]:
    """What comes from the peer is taken without a look at its digest."""
    return replaced(follower, "_fits", lambda incoming, put: True)


def state_range_skipped() -> contextlib.AbstractContextManager[None]:
    """Of a state that is taken, what comes in the second half of a part is left out, and nobody counts."""
    add = transfer.add

    def some(txn: Transaction, table: str, rows: Sequence[transfer.Row]) -> None:
        whole = table in ("entries", "kept", "instances")
        add(txn, table, rows if whole else rows[: len(rows) // 2])

    stack = contextlib.ExitStack()
    stack.enter_context(replaced(transfer, "add", some))
    stack.enter_context(replaced(transfer, "check_counts", lambda txn, head: None))
    return stack


def state_without_what_is_missing() -> contextlib.AbstractContextManager[None]:
    """Whoever takes a state doesn't note that it has no copies of what is new to it."""
    own_rows = transfer._own_rows

    def silent(before: Transaction, kept: Iterable[transfer.Row]) -> Iterator[tuple[str, bytes, bytes]]:
        return (row for row in own_rows(before, kept) if row[0] != "missing")

    return replaced(transfer, "_own_rows", silent)


def silent_files_are_nobodys() -> contextlib.AbstractContextManager[None]:
    """What lies in a spool folder and doesn't say what it is belongs to no entry."""
    named = Catalogue.named

    def of_those_that_speak(self: Catalogue, said: dict[str, Description | None]) -> dict[str, Location | None]:
        return named(self, {key: one for key, one in said.items() if one is not None})

    return replaced(Catalogue, "named", of_those_that_speak)


def blocks_unchecked() -> contextlib.AbstractContextManager[None]:
    """A long object is given out as it is read."""
    return replaced(reading, "are_good", lambda *_: True)


def names_answered_early() -> contextlib.AbstractContextManager[None]:
    """Who changes a name is answered before anybody has it for certain."""

    async def at_once(self: Proposal) -> None:
        pass

    return replaced(Proposal, "committed", at_once)


def names_decided_on_old_rows() -> contextlib.AbstractContextManager[None]:
    """A change of a name is decided without those that aren't in the catalogue yet."""
    return replaced(Namespace, "_over", lambda self, txn: txn)


def names_left_out_of_the_state() -> contextlib.AbstractContextManager[None]:
    """Whoever takes a state takes no names of the share."""
    return replaced(transfer, "LATER", ("blocks",))


def flush_answered_before_the_peer() -> contextlib.AbstractContextManager[None]:
    """What is flushed was told to the other node, and isn't waited for there."""

    async def at_once(self: Mirroring, file: OpenFile) -> tuple[str, ...]:
        return ()

    return replaced(Mirroring, "sync", at_once)


def copy_not_synced() -> contextlib.AbstractContextManager[None]:
    """The other node says that what it was told is durable, and has never had it synced."""
    carry_out = Keeper._one

    def unsynced(self: Keeper, kept: Any, op: Any) -> Any:
        return Synced() if isinstance(op, Sync) and kept.begun else carry_out(self, kept, op)

    return replaced(Keeper, "_one", unsynced)


def dirty_after_the_write() -> contextlib.AbstractContextManager[None]:
    """A file is marked as changed with its flush, and not before it is written to."""
    change = Share._change

    def marked_never(self: Share, one: Change) -> Any:
        return None if isinstance(one, MarkDirty) else change(self, one)

    return replaced(Share, "_change", marked_never)


def stale_block_kept() -> contextlib.AbstractContextManager[None]:
    """What is brought to a node that was away ends with the second block."""
    bring = Mirroring._bring_blocks

    async def shorter(self: Mirroring, file: OpenFile, local: Any, session: int, size: int) -> None:
        await bring(self, file, local, session, min(size, 2 * mirroring.BLOCK_BYTES))

    return replaced(Mirroring, "_bring_blocks", shorter)


def lacking_not_noted() -> contextlib.AbstractContextManager[None]:
    """A flush that the other node hasn't got is held to be on both."""
    flushed = files.flushed

    def on_both(txn: KeyValues, change: Flush) -> Any:
        return flushed(txn, msgspec.structs.replace(change, lacking=change.lacking and ()))

    return replaced(files, "CARRIED_OUT", {**files.CARRIED_OUT, Flush: on_both})


def moved_before_it_is_whole() -> contextlib.AbstractContextManager[None]:
    """A copy that is moved to another disk counts without what was written while it was moved."""

    fill = Share._fill

    async def once(self: Share, file: OpenFile, made: Any, local: Any, *, settled: bool) -> None:
        if not settled:
            await fill(self, file, made, local, settled=settled)

    return replaced(Share, "_fill", once)


def looked_at_too_late() -> contextlib.AbstractContextManager[None]:
    """What was seen of a file counts although it was written to since."""
    indexed = file_images.indexed

    def whenever(txn: Transaction, seq: int, operation: IndexFile) -> None:
        since = txn.get("file_unlooked", file_rows.number_key(operation.number))
        if since is not None:
            indexed(
                txn, seq, msgspec.structs.replace(operation, since=file_rows.number_of(since[: file_rows.NUMBER_BYTES]))
            )

    return replaced(file_images, "indexed", whenever)


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
        record_before_its_sync,
        checkpoint_before_its_sync,
        trimmed_too_early,
        tail_not_replayed,
        log_entry_before_bytes,
        ack_before_the_peer,
        tombstone_dropped_early,
        roll_forward_skipped,
        shrink_without_the_compare,
        heal_from_the_worse_copy,
        state_range_skipped,
        state_without_what_is_missing,
        silent_files_are_nobodys,
        blocks_unchecked,
        names_answered_early,
        names_decided_on_old_rows,
        names_left_out_of_the_state,
        flush_answered_before_the_peer,
        copy_not_synced,
        dirty_after_the_write,
        stale_block_kept,
        lacking_not_noted,
        moved_before_it_is_whole,
        looked_at_too_late,
    )
}
