"""C-STORE (PS3.4 annex B): what is received is kept bit for bit, on both nodes, before Success is said."""

import contextlib
import time
from typing import BinaryIO

import structlog

from gateway.dicom.dimse import Status
from gateway.dicom.identify import Identity, Unreadable, identify
from gateway.dicom.part10 import file_header
from gateway.dicom.sop_classes import is_storage_class
from gateway.dicom.uids import is_uid
from gateway.dimse.context import Context
from gateway.dimse.service import Call, Receiver, Refuser
from storage.state.model import Put
from storage.store import Conflict, NoRoom, NotServing, Upload

log = structlog.get_logger()


class Storer:
    """C-STORE (PS3.4 B.2): bytes to the disk and the peer as they come; Success once both hold them durably."""

    def __init__(self, call: Call, context: Context, upload: Upload) -> None:
        self._call, self._context, self._upload = call, context, upload
        self._identity: Identity | None = None
        self._looked = False

    @property
    def backlogged(self) -> bool:
        return self._upload.backlogged

    async def room(self) -> None:
        await self._upload.room()

    def feed(self, view: memoryview) -> None:
        incoming = self._upload.incoming
        incoming.feed(view)
        if not self._looked and incoming.first is not None:
            self._look(whole=False)

    def _look(self, *, whole: bool) -> None:
        """Read the identity from the first chunk, if it is in there."""
        self._looked = True
        incoming = self._upload.incoming
        try:
            self._identity = identify(
                incoming.first or b"",
                self._call.transfer_syntax,
                whole=whole,
                default_set=self._context.settings.default_character_set,
            )
        except Unreadable:
            return  # found again, and answered, when the object is complete
        if self._identity:
            with contextlib.suppress(NoRoom):  # then it stays on the volume it was begun on
                self._upload.place(self._identity.study)

    async def respond(self) -> None:
        try:
            await self._store()
        except NoRoom as error:
            await self._upload.discard()
            self._call.answer(Status.OUT_OF_RESOURCES, str(error))
        except OSError as error:
            log.error("store.disk", error=error.strerror)
            self._call.answer(Status.OUT_OF_RESOURCES, "a disk failed or is full; try again")

    async def _store(self) -> None:
        upload, incoming, store = self._upload, self._upload.incoming, self._context.store
        incoming.complete()
        if not self._looked:
            self._look(whole=True)
        try:
            identity = self._identity or await self._identify_spooled()
        except Unreadable as error:
            await self._refuse(Status.CANNOT_UNDERSTAND, str(error))
            return
        problem = self._problem(identity)
        if problem:
            await self._refuse(*problem)
            return

        def make(digest: bytes, length: int) -> Put:
            return Put(
                sop_instance=identity.sop_instance,
                sop_class=identity.sop_class,
                study=identity.study,
                series=identity.series,
                transfer_syntax=self._call.transfer_syntax,
                digest=digest,
                length=length,
                offset=incoming.offset,
                keys=identity.keys,
                calling_ae=self._call.peer.calling_ae,
                received=time.time(),
            )

        try:
            await store.put(upload, make)
        except Conflict:
            self._call.answer(Status.DUPLICATE_SOP_INSTANCE, "UID is stored with other bytes; yours is in quarantine")
            return
        self._call.answer(Status.SUCCESS)

    async def _identify_spooled(self) -> Identity:
        """For a data set whose head is longer than the first chunk, or that can't be read."""
        await self._upload.incoming.finish()

        def read(file: BinaryIO) -> Identity | None:
            default_set = self._context.settings.default_character_set
            return identify(file, self._call.transfer_syntax, whole=True, default_set=default_set)

        identity = await self._upload.read(read)
        if identity is None:
            raise Unreadable("the data set has no identity")
        return identity

    def _problem(self, identity: Identity) -> tuple[int, str] | None:
        for name, uid in (
            ("SOP Instance UID", identity.sop_instance),
            ("Study Instance UID", identity.study),
            ("Series Instance UID", identity.series),
        ):
            if not is_uid(uid):
                return Status.DATA_SET_MISMATCH, f"{name} is missing or isn't a UID"
        request = self._call.request
        if request.sop_instance != identity.sop_instance or request.sop_class != identity.sop_class:
            return Status.DATA_SET_MISMATCH, "command and data set name different SOP UIDs"
        return None

    async def _refuse(self, status: int, why: str) -> None:
        """Keep what can't be stored in quarantine, then say so."""
        await self._upload.incoming.finish()
        await self._upload.set_aside(why, self._call.request.sop_instance)
        log.warning("store.refused", status=f"0x{status:04X}", why=why, calling_ae=self._call.peer.calling_ae)
        self._call.answer(status, why)

    async def abandon(self) -> None:
        await self._upload.discard()


def storer(call: Call, context: Context) -> Receiver:
    request = call.request
    specialized = call.peer.negotiated.specialized if call.peer.negotiated else frozenset()
    if not is_storage_class(call.abstract_syntax, context.settings) and call.abstract_syntax not in specialized:
        return Refuser(call, Status.NO_SUCH_SOP_CLASS, "not a storage presentation context")
    if request.sop_class != call.abstract_syntax:
        return Refuser(call, Status.SOP_CLASS_NOT_SUPPORTED, "SOP Class UID doesn't fit the presentation context")
    if not request.has_data:
        return Refuser(call, Status.DATA_SET_MISMATCH, "no data set")
    header = file_header(request.sop_class, request.sop_instance[:64], call.transfer_syntax, call.peer.calling_ae)
    try:
        return Storer(call, context, context.store.begin(header))
    except NotServing:
        return Refuser(call, Status.OUT_OF_RESOURCES, "not the primary now")
    except NoRoom as error:
        return Refuser(call, Status.OUT_OF_RESOURCES, str(error))
