"""Offers the primary again what this node had prepared and the pair never committed.

The sender heard no Success for it and will most likely have sent it anew; if not, this is the only copy. What was
deleted, or stored since, isn't offered. A refusal is noted and the object stays in quarantine.
"""

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import structlog
from pydicom import dcmread

from conf.settings import Destination as DestinationSettings
from conf.settings import Settings
from conf.telling import place_of, reason_of
from gateway.archive.destinations import Destination
from gateway.dimse.connection import AssociationEnded
from gateway.dimse.requestor import Requestor, Unreachable, store_request
from storage.store import Store

log = structlog.get_logger()

INTERVAL_S: Final = 20.0
READ_BYTES: Final = 1 << 20
MEDIUM: Final = 0


class Offering:
    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings

    async def run(self) -> None:
        cluster = self._settings.cluster
        if cluster is None:
            return
        to = Destination(
            self._settings.dicom.aet,
            DestinationSettings(host=cluster.peer_address, port=self._settings.dicom.port, timeout_s=30.0),
        )
        while True:
            await asyncio.sleep(INTERVAL_S)
            if self._store.follows:
                await self.offer(to)

    async def offer(self, to: Destination) -> int:
        """One round; returns how many were taken."""
        store, taken = self._store, 0
        for one in await store.diverged():
            if "offered" in one:
                continue
            uid = str(one.get("sop_instance", ""))
            if store.is_archived(uid) or store.rows.is_deleted(uid):
                await store.amend(one, offered="not needed: stored or deleted since")
                continue
            try:
                status = await self._send(one, to)
            except (Unreachable, AssociationEnded, TimeoutError, OSError) as error:
                log.warning("offer.failed", why=reason_of(error))
                return taken
            except Exception as error:  # whatever its bytes lead to: the others are offered all the same
                log.error("offer.unreadable", sop_instance=uid, error=place_of(error))
                await store.amend(one, offered="not offered: it can't be read as what it was stored as")
                continue
            if status == 0:
                await store.purge(one)
                taken += 1
            else:
                await store.amend(one, offered=f"refused 0x{status:04X}")
            log.info("offer.answered", sop_instance=uid, status=f"0x{status:04X}")
        return taken

    async def _send(self, one: dict[str, Any], to: Destination) -> int:
        path = Path(one["file"])
        meta, start = await self._store.run(_head, path)
        sender = str(meta.get("SourceApplicationEntityTitle", "") or self._settings.dicom.aet)
        sop_class, syntax = str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)
        association = await Requestor.associate(sender, to, [(sop_class, (syntax,))])
        try:
            context_id = association.context_for(sop_class)
            if context_id is None:
                raise AssociationEnded("no presentation context")
            command = store_request(sop_class, str(meta.MediaStorageSOPInstanceUID), MEDIUM, None)
            answer = await association.invoke(context_id, command, self._blocks(path, start), to.timeout_s)
            return answer.status
        finally:
            await association.release()

    async def _blocks(self, path: Path, start: int) -> AsyncIterator[memoryview]:
        at = start
        while block := await self._store.run(_read, path, at):
            yield memoryview(block)
            at += len(block)


def _head(path: Path) -> tuple[Any, int]:
    """(file meta, where the data set begins) of a file that we wrote. Blocks."""
    meta = dcmread(path, stop_before_pixels=True, specific_tags=[]).file_meta
    with path.open("rb") as file:
        file.seek(140)
        (length,) = struct.unpack("<L", file.read(4))
    return meta, 144 + length


def _read(path: Path, at: int) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(READ_BYTES)
