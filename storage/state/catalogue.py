"""What one node knows: log, catalogue, location of its copies, and a few facts, in one store (LMDB).

One writer thread, `write`, one transaction and one sync a batch. Readers open snapshots from any thread.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from storage.replication.epochs import Epochs
from storage.state import changes, entries, file_images, file_rows, indexes, instances, places, rows, transfer
from storage.state.batch import Batch
from storage.state.changes import ADOPTED, same_copy
from storage.state.description import Description, lineage_of
from storage.state.entries import seq_key, seq_of
from storage.state.kv import CatalogueDamaged, Kv, LmdbKv, Transaction
from storage.state.model import (
    Entry,
    Forget,
    Leaving,
    Location,
    Put,
    decode_leaving,
    encode,
)
from storage.state.reader import Reader
from storage.state.rows import SeriesRow, series_row, study_row
from storage.state.transfer import Head, StateUnusable

__all__ = ["ADOPTED", "Batch", "Catalogue", "same_copy", "seq_key"]

T = TypeVar("T")
# 1: 0.1, without a number; 2: lineage, series -> study, studies that name several patients; 3: a log beside it;
# 4: applied instances only in their row, by what differs within a series; 5: copies by volume, folders by number
# 6: the share's files; 7: studies by what is asked of them
FORMAT: Final = 7
MADE_BY: Final = {"format": FORMAT, "index_rules": indexes.RULES}  # facts of a catalogue that is made by this version
PAGE_ROWS: Final = 500
COPIES_LOOKED_AT: Final = 8  # of a study, to find a volume that has something of it
TABLES: Final = (
    "log",  # the log's last number, see `entries`
    "entries",  # seq -> Entry
    "kept",  # seq -> key of the instance that an applied entry is
    "blocks",  # seq -> digests of the blocks of a long object
    "meta",
    "location",  # seq of the entry -> where this node's copy lies
    "placed",  # number of a volume, seq -> nothing
    "words",  # volumes and folders by number, see `places`
    "copies",  # UUID of a volume -> how many lie there
    "missing",  # seq -> why this node has no copy of its own now
    "leaving",  # volume/spool name -> file to be moved out of the way
    "instances",
    "tombstone",  # SOP Instance UID -> by which entry it was deleted
    "series",
    "study",
    "number",  # study, series -> number of the series
    "base",  # number of a series -> what its instances say, see `instances`
    "tally",  # number of a series -> how many instances of each SOP class
    "members",  # number of a series, key of an instance -> nothing
    "instance",  # until format 2: SOP Instance UID -> Instance
    "member",  # until format 2: study, series, SOP Instance UID -> nothing
    "patient",  # Patient ID, study -> nothing
    "series_study",  # series, study -> nothing
    *indexes.TABLES,
    "conflict",  # studies that name more than one patient
    "task",  # ID -> Task that isn't over
    *file_rows.TABLES,
    *file_images.TABLES,
    "file_gone",  # inode number -> generations of its copies: they are to be removed from this node's volumes
)


class Catalogue(Reader):
    def __init__(self, kv: Kv) -> None:
        """Raises CatalogueDamaged."""
        super().__init__(kv)
        self.kv = kv
        self.tail: dict[int, tuple[Entry, Location | None]] = {}  # logged, and not written here yet
        self.generation = 0  # another one with each state that was taken; odd while one takes this one's place
        self.epochs = Epochs(self.meta("epochs", ()))
        self._check_tail()

    @classmethod
    def open(cls, path: Path, map_size_bytes: int) -> "Catalogue":
        """Raises CatalogueDamaged."""
        return cls(LmdbKv(path, map_size_bytes, TABLES))

    def close(self) -> None:
        self.kv.close()

    # -- facts and log -----------------------------------------------------------------------------------------

    def meta(self, name: str, default: Any) -> Any:
        with self.kv.read() as txn:
            return changes.meta(txn, name, default)

    @property
    def known_volumes(self) -> set[str]:
        """UUIDs of the volumes that hold, or have held, copies of this node."""
        return set(self.meta("volumes", ()))

    def entry(self, seq: int) -> Entry:
        """Raises CatalogueDamaged for one that isn't in the log."""
        if waiting := self.tail.get(seq):
            return waiting[0]
        with self.kv.read() as txn:
            return entries.entry_of(txn, seq, entries.epochs_of(txn))

    def entries(self, start: int, limit: int) -> list[Entry]:
        """Up to `limit` entries from seq `start` on."""
        tail = self.tail.copy()  # first: what isn't there any more is in the table by then
        with self.kv.read() as txn:
            epochs = entries.epochs_of(txn)
            end = min(epochs.last[1], start + limit - 1)
            found = [entries.entry_of(txn, seq, epochs) for seq in range(start, end + 1)]
        last = found[-1].seq if found else start - 1
        waiting = [entry for seq, (entry, _) in sorted(tail.items()) if seq > last]
        return found + waiting[: limit - len(found)]

    def _check_tail(self) -> None:
        """What isn't applied yet is there, up to the end and not beyond it. Raises CatalogueDamaged."""
        with self.kv.read() as txn:
            start = int(changes.meta(txn, "applied", 0)) + 1
            table = "entries" if txn.count("entries") or txn.count("kept") else "log"  # until format 3
            found = [seq_of(key) for key, _ in txn.scan(table, seq_key(start))]
            kept, instances_kept, instances_there = txn.last_key("kept"), txn.count("kept"), txn.count("instances")
            instances_there -= file_images.count_listed(txn)
            located, placed = txn.count("location"), txn.count("placed")
            converting, found_format = changes.meta(txn, "converting", 0), changes.meta(txn, "format", 1)
        last = self.epochs.last[1]
        if converting:
            return
        if found != list(range(start, last + 1)) or (kept and int.from_bytes(kept, "big") >= start):
            raise CatalogueDamaged(f"the log's entries from {start} on aren't all there: its epochs end at {last}")
        if found_format >= FORMAT and located != placed:
            raise CatalogueDamaged(f"{located} copies, and {placed} that are on a volume")
        if instances_kept != instances_there:
            raise CatalogueDamaged(
                f"{instances_there} instances, and {instances_kept} entries of the log that are some"
            )

    # -- copies ------------------------------------------------------------------------------------------------

    def location(self, seq: int) -> Location | None:
        waiting = self.tail.get(seq)  # first: what isn't there any more is in the table by then
        with self.kv.read() as txn:
            location = places.get(txn, seq)
        return waiting[1] if location is None and waiting else location

    def copies_on(self) -> dict[str, int]:
        """How many copies each volume has, by its UUID."""
        with self.kv.read() as txn:
            return places.counts(txn)

    def locations(self, start: int = 0, limit: int | None = None) -> Iterator[tuple[int, Location]]:
        """(seq, where the copy lies) in order of seq."""
        rows = self._paged(
            "location", b"", lambda txn, key, raw: (key, places.decode(txn, key, raw)), start=seq_key(start)
        )
        for key, location in islice(rows, limit):
            yield seq_of(key), location

    def locations_on(self, volume: str, start: int, limit: int) -> list[tuple[int, Location]]:
        """(seq, where it lies) of the copies on a volume, from entry `start` on."""
        with self.kv.read() as txn:
            return list(islice(places.on_volume(txn, volume, start), limit))

    def volume_of(self, study: str) -> str:
        """UUID of a volume that has something of a study, "" if none has."""
        with self.kv.read() as txn:
            for key in islice(rows.members(txn, study), COPIES_LOOKED_AT):
                one = instances.get(txn, key)
                location = places.get(txn, one.seq) if one is not None else None
                if location is not None:
                    return location.volume
        return ""

    def missing(self, start: int = 0, limit: int | None = None) -> list[int]:
        """Entries whose bytes this node lacks, oldest first."""
        found: list[int] = []
        with self.kv.read() as txn:
            for key, _ in txn.scan("missing", seq_key(start)):
                if limit is not None and len(found) >= limit:
                    break
                found.append(seq_of(key))
        return found

    def newest_missing(self, before: int, limit: int) -> list[int]:
        """Entries before this one (0: all) whose bytes this node lacks, newest first."""
        with self.kv.read() as txn:
            rows = txn.scan_back("missing", seq_key(before) if before else b"")
            return [seq_of(key) for key, _ in islice(rows, limit)]

    def sizes(self) -> tuple[int, int, int]:
        """(copies that this node lacks, instances of the archive, all instances and files of the share)"""
        with self.kv.read() as txn:
            instances, of_files = txn.count("instances"), file_images.count_listed(txn)
            return txn.count("missing"), instances - of_files, instances + txn.count("file_inodes")

    def was_at(self, seq: int) -> Location | None:
        """Where a missing copy lay before, if that is known."""
        with self.kv.read() as txn:
            return places.was_at(txn.get("missing", seq_key(seq)))

    def is_missing(self, seq: int) -> bool:
        with self.kv.read() as txn:
            return txn.get("missing", seq_key(seq)) is not None

    def leaving_paths(self) -> set[tuple[str, str]]:
        """(volume, path) of places in the tree that are not free yet."""
        with self.kv.read() as txn:
            if not txn.count("leaving"):
                return set()
            leavings = [decode_leaving(value).location for _, value in txn.scan("leaving")]
        return {(location.volume, location.path) for location in leavings if location.path}

    def leavings(self, limit: int, volume_id: str = "") -> list[tuple[str, Leaving]]:
        """Files on their way out, of all volumes or of one."""
        found: list[tuple[str, Leaving]] = []
        with self.kv.read() as txn:
            for key, value in txn.scan("leaving", volume_id.encode()):
                if len(found) >= limit or not key.startswith(volume_id.encode()):
                    break
                found.append((key.decode(), decode_leaving(value)))
        return found

    def named(self, said: dict[str, Description | None]) -> dict[str, Location | None]:
        """Those of these "volume/spool name", each with what its file says that it is, that a copy has, with its place,
        or a leaving file (None)."""
        with self.kv.read() as txn:
            lineage = lineage_of(str(changes.meta(txn, "lineage", "")))
            checkpoint = int(changes.meta(txn, "checkpoint", 0))
            if changes.meta(txn, "undescribed", False):  # some of older ones don't say it either
                checkpoint = 0
            found: dict[str, Location | None] = {}
            unknown: dict[str, int] = {}  # from which entry on one may name it
            for key, one in said.items():
                if txn.get("leaving", key.encode()) is not None:
                    found[key] = None
                elif one is None:
                    unknown[key] = checkpoint + 1  # files of older ones say what they are
                elif one.lineage != lineage:
                    unknown[key] = 0
                elif places.is_at(location := places.get(txn, one.seq), key):
                    found[key] = location
                elif places.is_at(places.was_at(txn.get("missing", seq_key(one.seq))), key):
                    found[key] = None  # it may be found there again
            return found | places.naming(txn, unknown)

    def files_gone(self, limit: int) -> dict[int, list[str]]:
        """Inodes that are no more, and whose bytes are still to be removed: the generations of their copies."""
        with self.kv.read() as txn:
            rows = islice(txn.scan("file_gone"), limit)
            return {seq_of(key): value.decode().split(",") for key, value in rows}

    def files_space(self) -> str:
        """The name of the inode numbers."""
        with self.kv.read() as txn:
            return file_rows.space(txn)

    def forgettable(self, upto: int) -> bool:
        """There is something that `Forget` up to there would make an end of."""
        with self.kv.read() as txn:
            return any(
                not isinstance(entries.operation_of(txn, seq_of(key)), Forget) for key in changes.over(txn, upto)
            )

    # -- places in the tree ------------------------------------------------------------------------------------

    def folders(self, put: Put, fresh: dict[str, str]) -> tuple[str, str]:
        """(patient/study folder, series folder) of an instance. `fresh` remembers those of this batch."""
        study = fresh.get(put.study)
        if study is None:
            row = self.study(put.study) or study_row(put)
            study = fresh[put.study] = f"{row.patient_folder}/{row.folder}"
        key = f"{put.study}\0{put.series}"
        series = fresh.get(key)
        if series is None:
            with self.kv.read() as txn:
                raw = txn.get("series", key.encode())
            series = msgspec.msgpack.decode(raw, type=SeriesRow).folder if raw else series_row(put).folder
            fresh[key] = series
        return study, series

    def path_of(self, entry: Entry, fresh: dict[str, str], *, own_name: bool = False) -> str:
        """Where in the readable tree an instance belongs. A version that replaces another has a name of its own, as has
        one that comes (`own_name`) before its predecessor has left."""
        put = entry.operation
        if not isinstance(put, Put):
            raise TypeError("only instances have a place in the tree")
        study, series = self.folders(put, fresh)
        version = f"~{entry.seq}" if put.replaces or own_name else ""
        return f"{study}/{series}/{put.sop_instance}{version}.dcm"

    # -- writing -----------------------------------------------------------------------------------------------

    def write(self, batch: Batch) -> None:
        """Do all of `batch` and make it durable. Whatever is raised, nothing of it was done."""
        epochs = Epochs(self.epochs.pairs)
        for entry, _ in batch.appends:
            epochs.append(entry.epoch, entry.seq)
        if batch.truncate_after is not None:
            epochs.truncate(batch.truncate_after)
        self.kv.update(lambda txn: self._write(txn, batch, epochs))
        self.epochs = epochs

    def become(self, new: Kv, head: Head, commit: Callable[[], AbstractContextManager[None]]) -> None:
        """From now on this is a state that was taken from the other node, and what is known here of this node's copies.
        All that is logged here is applied. `commit()` is entered for the last step. Raises StateUnusable and OSError if
        nothing has changed, CatalogueDamaged if that isn't known."""
        transfer.complete(self.kv, new, head)
        try:
            Catalogue(new)
        except CatalogueDamaged as error:
            raise StateUnusable(str(error)) from error
        new.sync()  # which takes a while; what is left to do then doesn't
        with commit():
            self.generation += 1
            try:
                self.kv.become(new)
            except OSError as error:
                raise CatalogueDamaged(f"the state that was taken: {error.strerror}") from error
            self.generation += 1
            self.epochs = Epochs(head.epochs)

    def _write(self, txn: Transaction, batch: Batch, epochs: Epochs) -> None:
        meta = dict(batch.meta)
        for entry, location in batch.appends:
            txn.append("entries", seq_key(entry.seq), encode(entry))
            changes.locate(txn, entry, location)
        if batch.truncate_after is not None:  # what was logged before it was asked for is cut off as well
            changes.truncate(txn, batch.truncate_after)
        stored_bytes = 0
        for entry, location in batch.applies:
            stored_bytes += changes.apply(txn, entry, location)
        for seq, (why, location) in batch.lost.items():
            changes.lose(txn, seq, why, location)
            if location.volume and seq > changes.meta(txn, "checkpoint", 0):
                meta["undescribed"] = True  # what its file says of itself was never durable, or never written
        for seq, location in batch.moved.items():
            changes.move(txn, seq, location)
        for key in batch.gone:
            txn.delete("leaving", key.encode())
        for number in batch.bytes_gone:
            txn.delete("file_gone", seq_key(number))
        if batch.appends or batch.truncate_after is not None:
            meta["epochs"] = epochs.pairs
            entries.note_end(txn, epochs)
        if batch.applies:
            meta["applied"] = max(changes.meta(txn, "applied", 0), batch.applied)
            meta["bytes"] = changes.meta(txn, "bytes", 0) + stored_bytes
        changes.put_meta(txn, meta)
