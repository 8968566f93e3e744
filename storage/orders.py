"""What an operator can have done on a running node: volumes, scrub, verify, delete, quarantine, reading an object.

Each order is a method of `Service`, named as the order with `_` for `-`; its arguments are the order's.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import structlog

from storage import crash
from storage.control import NT_HASH, USER_NAME
from storage.engine import Engine
from storage.objects.copies import Row
from storage.objects.local_volume import create_marker
from storage.objects.reading import Unavailable
from storage.objects.volume import Volume, VolumeOffline
from storage.replication.peering import FetchFailed
from storage.state.file_model import RemoveUser, SetUser, User, Users
from storage.state.file_rows import users
from storage.state.model import Delete
from storage.state.rows import belongs, identity_of
from storage.upkeep.quarantine import kept, purge

log = structlog.get_logger()

DIFFERENCES_MAX: Final = 100
DAY_S: Final = 86400.0

Progress = Callable[[int, int], None]


class Refused(Exception):
    """One line for the operator."""


class Service:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changing_users = asyncio.Lock()
        self._orders: dict[str, Callable[..., Any]] = {
            "volume-list": self._volume_list,
            "volume-add": self._volume_add,
            "volume-drain": self._volume_drain,
            "volume-retire": self._volume_retire,
            "scrub": self._scrub,
            "scrub-status": self._scrub_status,
            "verify": self._verify,
            "delete": self._delete,
            "instances": self._instances,
            "conflicts": self._conflicts,
            "get": self._get,
            "quarantine-list": self._quarantine_list,
            "quarantine-purge": self._quarantine_purge,
            "share-users": self._share_users,
            "share-user-set": self._share_user_set,
            "share-user-remove": self._share_user_remove,
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
        for slot in self._engine.volumes.slots:
            if slot.path == Path(path) and slot.volume is not None:
                return slot.volume
        raise Refused(f"{path} isn't a volume of this node; `tandem volume list` shows them")

    async def _volume_list(self, _: Progress) -> dict[str, Any]:
        rows = self._engine.volumes.status()
        held = await self._engine.disk.run(self._engine.catalogue.copies_on)
        return {"volumes": [{**row, "copies": held.get(row.get("id", ""), 0)} for row in rows]}

    async def _volume_add(self, _: Progress, path: str) -> dict[str, Any]:
        folder = Path(path)
        if not folder.is_absolute():
            raise Refused(f"{path}: give an absolute path")

        def make() -> None:
            with contextlib.suppress(FileExistsError):  # a volume already: taken as it is
                create_marker(folder)

        await self._engine.disk.run(make)
        try:
            volume_id = await self._engine.take_volume(folder)
        except VolumeOffline as error:
            raise Refused(str(error)) from error
        return {"id": volume_id}

    async def _volume_drain(self, progress: Progress, path: str) -> dict[str, Any]:
        """Copy all that lies on a volume to the others; nothing new is put there meanwhile and afterwards."""
        engine, volume = self._engine, self._volume_at(path)
        self._refuse_away(volume)
        others = [slot.volume for slot in engine.volumes.slots if slot.usable and slot.volume is not volume]
        if all(other is None or other.draining for other in others):
            raise Refused(f"{path} is the only volume that takes anything; add another one first")
        await engine.disk.run(volume.set_draining, True)
        moved = await engine.draining.instances(volume, progress)
        await engine.settled()
        files, why = await engine.draining.files(volume, progress)
        left = await engine.draining.files_on(volume) if why else []
        return {
            "moved": moved,
            "left": await engine.draining.held(volume),
            "files_moved": files,
            "files_left": len(left),
            "why": why,
        }

    def _refuse_away(self, volume: Volume) -> None:
        if not any(slot.usable for slot in self._engine.volumes.slots if slot.volume is volume):
            raise Refused(f"{volume.path} doesn't answer now, or isn't mounted; `tandem volume list` says how it is")

    async def _volume_retire(self, _: Progress, path: str) -> dict[str, Any]:
        engine, volume = self._engine, self._volume_at(path)
        await engine.settled()
        failed = any(slot.failed for slot in engine.volumes.slots if slot.volume is volume)
        if not failed:
            self._refuse_away(volume)
        left, files = await engine.draining.held(volume), 0 if failed else len(await engine.draining.files_on(volume))
        if left or files:
            raise Refused(f"{path} still holds {_named(left, files)}; `tandem volume drain {path}` moves them")
        if failed and (not engine.share_copies.up_to_date or await engine.draining.lacking()):
            raise Refused(
                f"files of the share that lay on {path} are still being looked for or made again, which takes both "
                "nodes and all other volumes; `tandem status` counts them"
            )
        if not (failed or volume.draining) and engine.catalogue.files_space():
            raise Refused(f"{path} may get files of the share at any time; `tandem volume drain {path}` ends that")
        engine.volumes.retire(volume.id)
        engine.mirror.keeper.forget_volumes()
        paths = sorted({str(slot.path) for slot in engine.volumes.slots})
        known = sorted(engine.catalogue.known_volumes - {volume.id})
        await engine.journal.record(volumes=known, volume_paths=paths)
        return {"id": volume.id}

    # -- checking ----------------------------------------------------------------------------------------------

    async def _scrub(self, progress: Progress, study: str = "") -> dict[str, Any]:
        return await self._engine.scrub.now(study, progress)

    async def _scrub_status(self, _: Progress) -> dict[str, Any]:
        """How far the node's own round is."""
        scrub = self._engine.scrub
        return {"at": scrub.at, "checked": scrub.checked, "bad": scrub.bad}

    async def _verify(self, progress: Progress, read: bool = True) -> dict[str, Any]:
        """Compare the two nodes entry by entry, and each copy with its digest."""
        engine = self._engine
        if engine.core.peer is None:
            raise Refused("this node runs alone; `tandem scrub --now` checks its copies")
        await engine.settled()
        start, last, entries = 1, engine.core.commit, 0
        differences: list[str] = []
        while start <= last:
            mine = await engine.disk.run(lambda at: engine.copies.listing(at, read), start)
            try:
                theirs = {row.seq: row for row in await engine.peering.listing(start, read=read)}
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
        me, peer = self._engine.core.node, self._engine.core.peer
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
        if not self._engine.may_serve:
            raise Refused(f"not the primary now; delete on node {self._engine.told.primary or 'with the address'}")
        count = await self._engine.delete(Delete(study, series, sop_instance, reason, by, time.time()))
        log.warning(
            "audit.deleted", study=study, series=series, sop_instance=sop_instance, reason=reason, by=by, count=count
        )
        return {"deleted": count}

    async def _instances(self, _: Progress, study: str) -> dict[str, Any]:
        """The SOP Instance UIDs of a study."""
        engine = self._engine
        await engine.settled()

        def found() -> list[str]:
            series = [uid for uid, _ in engine.catalogue.series_of(study)]
            return [one.put.sop_instance for uid in series for one in engine.catalogue.instances_of(study, uid)]

        return {"instances": await engine.disk.run(found)}

    async def _conflicts(self, _: Progress, limit: int = 1000) -> dict[str, Any]:
        """Studies whose instances name more than one patient: how many instances name which."""
        engine = self._engine
        await engine.settled()

        def look(study: str) -> dict[str, Any]:
            row = engine.catalogue.study(study)
            patients = [identity_of(one) for one in row.patients] if row else []
            counted = dict.fromkeys(patients, 0)
            for series, _row in engine.catalogue.series_of(study):
                for one in engine.catalogue.instances_of(study, series):
                    for patient in patients:
                        counted[patient] += bool(row and belongs(one.put.keys, row, patient))
            rows = [{"patient_id": one, "issuer": issuer, "instances": n} for (one, issuer), n in counted.items()]
            return {"study": study, "patients": rows}

        def found() -> list[dict[str, Any]]:
            return [look(study) for study in engine.catalogue.conflicts(limit)]

        return {"studies": await engine.disk.run(found), "count": engine.catalogue.counts()["conflicts"]}

    async def _get(self, _: Progress, sop_instance: str) -> dict[str, Any]:
        """Where a checked copy lies on this node, made again from the peer if need be; `digest`: XXH3-128 of all after
        `offset`. Who asks reads it himself: this process may not write where that one may."""
        engine = self._engine
        await engine.settled()
        instance = engine.catalogue.instance(sop_instance)
        if instance is None:
            raise Refused(f"{sop_instance} isn't stored here")
        had = await engine.disk.run(engine.copies.find, instance.seq) is not None
        try:
            source = await engine.reading.open(instance, whole=True)
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
        return {"objects": await self._engine.disk.run(kept, self._engine.volumes)}

    async def _quarantine_purge(self, _: Progress, older_than_days: float, ids: list[str] = []) -> dict[str, Any]:  # noqa: B006
        """Delete quarantined objects for good: those named, or all that are older."""

        def purge_all() -> int:
            count = 0
            for one in kept(self._engine.volumes):
                old = time.time() - float(one["since"]) > older_than_days * DAY_S
                if one["id"] in ids if ids else old:
                    purge(one)
                    count += 1
            return count

        count = await self._engine.disk.run(purge_all)
        log.warning("audit.purged", count=count, older_than_days=older_than_days)
        return {"purged": count}

    # -- users of the share ------------------------------------------------------------------------------------

    def _users(self) -> dict[str, User]:
        with self._engine.catalogue.kv.read() as txn:
            return users(txn)

    async def _share_users(self, _: Progress) -> dict[str, Any]:
        """Who may use the share, as this node knows it."""
        found = await self._engine.disk.run(self._users)
        rows = [
            {"name": name, "number": user.number, "nt_hash": user.nt_hash.hex(), "set_ns": user.at}
            for name, user in found.items()
        ]
        return {"users": rows}

    async def _share_user_set(self, _: Progress, name: str, nt_hash: str, is_new: bool) -> dict[str, Any]:
        """A user comes to be, or gets another password; `nt_hash`: MD4 of it in UTF-16, as hexadecimal digits."""
        if not USER_NAME.fullmatch(name) or not NT_HASH.fullmatch(nt_hash):
            raise Refused("the name of a user, and 32 hexadecimal digits")
        change = SetUser(name, bytes.fromhex(nt_hash), time.time_ns(), is_new)
        await self._change_users(change, known=not is_new)
        log.warning("audit.share_user", user=name, what="added" if is_new else "password changed")
        return {"user": name}

    async def _share_user_remove(self, _: Progress, name: str) -> dict[str, Any]:
        await self._change_users(RemoveUser(name), known=True)
        log.warning("audit.share_user", user=name, what="removed")
        return {"user": name}

    async def _change_users(self, change: Users, *, known: bool) -> None:
        """`known`: whether the user must be there before, or mustn't."""
        engine, name = self._engine, change.name
        if not engine.may_serve:
            raise Refused(f"not the primary now; do it on node {engine.told.primary or 'with the address'}")
        async with self._changing_users:
            await engine.settled()
            found = name in await engine.disk.run(self._users)
            if known and not found:
                raise Refused(f"there is no user {name}; `tandem share user list` shows them")
            if found and not known:
                raise Refused(f"there is a user {name}; `tandem share user password {name}` sets another password")
            await engine.propose_files(change).committed()
            await engine.settled()

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


def _named(instances: int, files: int) -> str:
    said = [f"{instances} copies of instances"] if instances else []
    return " and ".join(said + ([f"{files} files of the share"] if files else []))
