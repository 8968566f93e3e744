"""C-STORE (PS3.4 annex B): what is received is kept bit for bit, on both nodes, before Success is said."""

import contextlib

import structlog

from gateway.dicom.dimse import Status
from gateway.dicom.identify import Identifier, Identity, Unreadable
from gateway.dicom.part10 import file_header
from gateway.dicom.sop_classes import is_storage_class
from gateway.dicom.uids import is_uid
from gateway.dimse.context import Context
from gateway.dimse.service import Call, Receiver, Refuser
from gateway.workers.pool import WorkFailed
from storage.state.model import Put
from storage.store import Conflict, NoRoom, NotServing, Upload

log = structlog.get_logger()

IDENTIFY_S = 30.0  # for a data set that has to be read by a worker


class Storer:
    """C-STORE (PS3.4 B.2): bytes to the disk and the peer as they come; Success once both hold them durably."""

    def __init__(self, call: Call, context: Context, upload: Upload) -> None:
        self.call, self._context, self._upload = call, context, upload
        self._identifier = Identifier(call.transfer_syntax, context.settings.default_character_set)
        self._placed = self._too_long = False
        self._bytes = 0

    @property
    def backlogged(self) -> bool:
        return self._upload.backlogged

    async def room(self) -> None:
        await self._upload.room()

    def feed(self, view: memoryview) -> None:
        self._bytes += len(view)
        if self._bytes > self._context.settings.max_object_bytes:
            if not self._too_long:
                self._too_long = True
                self._upload.discard_soon()
            return
        self._upload.feed(view)
        self._identifier.feed(view)
        if not self._placed and (study := self._identifier.study):
            self._placed = True
            with contextlib.suppress(NoRoom):  # then it stays on the volume it was begun on
                self._upload.place(study)

    async def respond(self) -> None:
        if self._too_long:
            self.call.answer(Status.OUT_OF_RESOURCES, "larger than dicom.max_object_bytes")
            return
        try:
            await self._store()
        except NoRoom as error:
            self.call.answer(Status.OUT_OF_RESOURCES, str(error))
        except OSError as error:
            log.error("store.disk", error=error.strerror)
            self.call.answer(Status.OUT_OF_RESOURCES, "a disk failed or is full; try again")
        finally:
            self._upload.discard_soon()

    async def _store(self) -> None:
        upload, store = self._upload, self._context.store
        upload.complete()
        try:
            identity = self._identifier.identity() or await self._identify_anew()
        except Unreadable as error:
            await self._refuse(Status.CANNOT_UNDERSTAND, str(error))
            return
        problem = self._problem(identity)
        if problem:
            await self._refuse(*problem)
            return

        def make(digest: bytes, length: int) -> Put:
            caller = self.call.peer.calling_ae
            return identity.record(self.call.transfer_syntax, digest, length, upload.offset, caller)

        self.call.outcome.bytes = self._bytes
        try:
            await store.put(upload, make)
        except Conflict:
            self.call.answer(Status.DUPLICATE_SOP_INSTANCE, "UID is stored with other bytes; yours is in quarantine")
            return
        self.call.answer(Status.SUCCESS)

    async def _identify_anew(self) -> Identity:
        """What the scan on the way in couldn't read: deflated, odd, or of very many elements. Raises Unreadable."""
        try:
            found = await self._context.readers.ask(
                "identify",
                await self._upload.source(),
                self.call.transfer_syntax,
                self._context.settings.default_character_set,
                timeout_s=IDENTIFY_S,
            )
        except WorkFailed as error:
            raise Unreadable(f"the data set can't be read: {error}"[:64]) from error
        return Identity(*found)

    def _problem(self, identity: Identity) -> tuple[int, str] | None:
        if problem := identity.problem(lenient=self._context.settings.lenient_uids):
            return Status.DATA_SET_MISMATCH, problem
        request = self.call.request
        if request.sop_instance != identity.sop_instance or request.sop_class != identity.sop_class:
            return Status.DATA_SET_MISMATCH, "command and data set name different SOP UIDs"
        return None

    async def _refuse(self, status: int, why: str) -> None:
        """Keep what can't be stored in quarantine, then say so."""
        uid = self.call.request.sop_instance
        await self._upload.set_aside(why, uid if is_uid(uid, lenient=True) else "")
        log.warning("store.refused", status=f"0x{status:04X}", why=why, **self.call.peer.who)
        self.call.answer(status, why)

    async def abandon(self) -> None:
        self._upload.discard_soon()


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
