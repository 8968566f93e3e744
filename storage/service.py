"""What an operator can have done on a running node: volumes, scrub, verify, delete, quarantine, reading an object.

Each order is a method of `Service`, named as the order with `_` for `-`; its arguments are the order's.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import structlog

from storage import crash
from storage.copies import Row
from storage.incoming import Incoming
from storage.model import Delete
from storage.peering import FetchFailed
from storage.quarantine import kept, purge
from storage.reading import Unavailable
from storage.store import Store
from storage.volume import READ_BYTES, Volume, VolumeOffline, create_marker

log = structlog.get_logger()

DIFFERENCES_MAX: Final = 100
DRAIN_BATCH: Final = 16
DAY_S: Final = 86400.0

Progress = Callable[[int, int], None]


class Refused(Exception):
    """One line for the operator."""


class Service:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._orders: dict[str, Callable[..., Any]] = {
            "volume-list": self._volume_list,
            "volume-add": self._volume_add,
            "volume-drain": self._volume_drain,
            "volume-retire": self._volume_retire,
            "scrub": self._scrub,
            "verify": self._verify,
            "delete": self._delete,
            "instances": self._instances,
            "get": self._get,
            "quarantine-list": self._quarantine_list,
            "quarantine-purge": self._quarantine_purge,
            "crash": self._crash,
        }

    async def carry_out(self, name: str, given: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Raises Refused, OSError, NotServing or NoRoom."""
        order = self._orders.get(name)
        if order is None:
            raise Refused(f"unknown order {name}")
        try:
            result: dict[str, Any] = await order(progress, **given)
        except TypeError as error:
            raise Refused(f"{name}: {error}") from error
        return result

    # -- volumes -----------------------------------------------------------------------------------------------

    def _volume_at(self, path: str) -> Volume:
        for slot in self._store.volumes.slots:
            if slot.path == Path(path) and slot.volume is not None:
                return slot.volume
        raise Refused(f"{path} isn't a volume of this node; `tandem volume list` shows them")

    async def _volume_list(self, _: Progress) -> dict[str, Any]:
        rows = self._store.volumes.status()
        held: dict[str, int] = {}
        for _seq, location in await self._store.disk.run(lambda: list(self._store.catalogue.locations())):
            held[location.volume] = held.get(location.volume, 0) + 1
        return {"volumes": [{**row, "copies": held.get(row.get("id", ""), 0)} for row in rows]}

    async def _volume_add(self, _: Progress, path: str) -> dict[str, Any]:
        folder = Path(path)
        if not folder.is_absolute():
            raise Refused(f"{path}: give an absolute path")

        def make() -> None:
            with contextlib.suppress(FileExistsError):  # a volume already: taken as it is
                create_marker(folder)

        await self._store.disk.run(make)
        try:
            volume_id = await self._store.take_volume(folder)
        except VolumeOffline as error:
            raise Refused(str(error)) from error
        return {"id": volume_id}

    async def _volume_drain(self, progress: Progress, path: str) -> dict[str, Any]:
        """Copy all that lies on a volume to the others; nothing new is put there meanwhile and afterwards."""
        store, volume = self._store, self._volume_at(path)
        await store.disk.run(volume.set_draining, True)
        seqs = await store.disk.run(self._held, volume.id)
        moved = 0
        for at in range(0, len(seqs), DRAIN_BATCH):
            found = {}
            for seq in seqs[at : at + DRAIN_BATCH]:
                incoming = await self._copy(seq, volume)
                if incoming:
                    found[seq] = incoming
            moved += len(await store.journal.move({seq: incoming.location for seq, incoming in found.items()}))
            progress(at + DRAIN_BATCH, len(seqs))
            await store.journal.quiet()
        left = len(await store.disk.run(self._held, volume.id))
        return {"moved": moved, "left": left}

    def _held(self, volume_id: str) -> list[int]:
        """Entries whose copy lies on a volume. Blocks."""
        return [seq for seq, location in self._store.catalogue.locations() if location.volume == volume_id]

    async def _copy(self, seq: int, volume: Volume) -> Incoming | None:
        """A verified second copy on another volume of this node, None if the first is gone or no good."""
        store = self._store
        found = await store.disk.run(store.copies.find, seq)
        if found is None or found[0] is not volume:
            return None
        _, name, put = found
        file = await store.disk.run(volume.open, name)
        try:
            incoming = Incoming(store.disk, store.volumes, store.volumes.choose(), file.read(put.offset))
            while block := await store.disk.run(file.read, READ_BYTES):
                incoming.feed_chunk(bytearray(block))
        finally:
            file.close()
        await incoming.finish()
        if incoming.digest != put.digest:
            await incoming.discard()
            await store.healing.examine(seq)
            return None
        return incoming

    async def _volume_retire(self, _: Progress, path: str) -> dict[str, Any]:
        store, volume = self._store, self._volume_at(path)
        left = len(await store.disk.run(self._held, volume.id))
        if left:
            raise Refused(f"{path} still holds {left} copies; `tandem volume drain {path}` moves them")
        store.volumes.retire(volume.id)
        paths = sorted({str(slot.path) for slot in store.volumes.slots})
        known = sorted(store.catalogue.known_volumes - {volume.id})
        await store.journal.record(volumes=known, volume_paths=paths)
        return {"id": volume.id}

    # -- checking ----------------------------------------------------------------------------------------------

    async def _scrub(self, progress: Progress, study: str = "") -> dict[str, Any]:
        return await self._store.scrub.now(study, progress)

    async def _verify(self, progress: Progress, read: bool = True) -> dict[str, Any]:
        """Compare the two nodes entry by entry, and each copy with its digest."""
        store = self._store
        if store.core.peer is None:
            raise Refused("this node runs alone; `tandem scrub --now` checks its copies")
        await store.settled()
        start, last, entries = 1, store.core.commit, 0
        differences: list[str] = []
        while start <= last:
            mine = await store.disk.run(lambda at: store.copies.listing(at, read), start)
            try:
                theirs = {row.seq: row for row in await store.peering.listing(start, read=read)}
            except FetchFailed as error:
                raise Refused(str(error)) from error
            for row in mine:
                if row.seq <= last:
                    entries += 1
                    differences += self._compare(row, theirs.get(row.seq))
            start = (mine[-1].seq if mine else last) + 1
            progress(min(start, last), last)
        return {
            "entries": entries,
            "differences": differences[:DIFFERENCES_MAX],
            "count": len(differences),
            "same": not differences,
        }

    def _compare(self, mine: Row, theirs: Row | None) -> list[str]:
        me, peer = self._store.core.node, self._store.core.peer
        if theirs is None or theirs.epoch != mine.epoch:
            return [f"entry {mine.seq}: not on node {peer}"]
        if mine.kind == "void" or theirs.kind == "void":
            return []  # deleted or replaced on one of them already
        if (mine.kind, mine.digest) != (theirs.kind, theirs.digest):
            return [f"entry {mine.seq}: the nodes differ"]
        return [
            f"{mine.sop_instance}: copy on node {node} is {row.copy}"
            for node, row in ((me, mine), (peer, theirs))
            if row.copy in ("bad", "missing")
        ]

    # -- objects -----------------------------------------------------------------------------------------------

    async def _delete(
        self, _: Progress, study: str, reason: str, by: str, series: str = "", sop_instance: str = ""
    ) -> dict[str, Any]:
        if not reason.strip():
            raise Refused("a deletion needs a reason")
        if not self._store.may_serve:
            raise Refused(f"not the primary now; delete on node {self._store.told.primary or 'with the address'}")
        count = await self._store.delete(Delete(study, series, sop_instance, reason, by, time.time()))
        log.warning(
            "audit.deleted", study=study, series=series, sop_instance=sop_instance, reason=reason, by=by, count=count
        )
        return {"deleted": count}

    async def _instances(self, _: Progress, study: str) -> dict[str, Any]:
        """The SOP Instance UIDs of a study."""
        store = self._store
        await store.settled()

        def found() -> list[str]:
            series = [uid for uid, _ in store.catalogue.series_of(study)]
            return [one.put.sop_instance for uid in series for one in store.catalogue.instances_of(study, uid)]

        return {"instances": await store.disk.run(found)}

    async def _get(self, _: Progress, sop_instance: str) -> dict[str, Any]:
        """Where a checked copy lies on this node, made again from the peer if need be; `digest`: XXH3-128 of all after
        `offset`. Who asks reads it himself: this process may not write where that one may."""
        store = self._store
        await store.settled()
        instance = store.catalogue.instance(sop_instance)
        if instance is None:
            raise Refused(f"{sop_instance} isn't stored here")
        had = await store.disk.run(store.copies.find, instance.seq) is not None
        try:
            source = await store.reading.open(instance)
        except Unavailable as error:
            raise Refused(str(error)) from error
        return {
            "sop_instance": sop_instance,
            "from": "this node" if had else "the other node",
            "file": str(source.volume.path / source.name),
            "offset": source.put.offset,
            "digest": source.put.digest.hex(),
        }

    # -- quarantine --------------------------------------------------------------------------------------------

    async def _quarantine_list(self, _: Progress) -> dict[str, Any]:
        return {"objects": await self._store.disk.run(kept, self._store.volumes)}

    async def _quarantine_purge(self, _: Progress, older_than_days: float, ids: list[str] = []) -> dict[str, Any]:  # noqa: B006
        """Delete quarantined objects for good: those named, or all that are older."""

        def purge_all() -> int:
            count = 0
            for one in kept(self._store.volumes):
                old = time.time() - float(one["since"]) > older_than_days * DAY_S
                if one["id"] in ids if ids else old:
                    purge(one)
                    count += 1
            return count

        count = await self._store.disk.run(purge_all)
        log.warning("audit.purged", count=count, older_than_days=older_than_days)
        return {"purged": count}

    # -- faults ------------------------------------------------------------------------------------------------

    async def _crash(self, _: Progress, point: str, count: int = 1) -> dict[str, Any]:
        """Kill this process at a named point; only where faults are asked for, in the lab."""
        if os.environ.get("TANDEM_FAULTS") != "1":
            raise Refused("faults on purpose are for the lab (TANDEM_FAULTS=1)")
        try:
            crash.arm(point, count)
        except ValueError as error:
            raise Refused(str(error)) from error
        return {"armed": point}
