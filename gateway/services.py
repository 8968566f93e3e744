"""The DIMSE services: what is done with a request and its data set. One receiver object a message.

`feed` is called on the event loop with each piece of the data set; `respond` once it is complete, and writes the
responses.
"""

import asyncio
import contextlib
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice
from typing import Final, Protocol

import structlog

from conf.settings import DicomSettings
from gateway.dimse import Command, Request, Status, encode_response
from gateway.find import BadQuery, Query, decode_identifier, encode_identifier
from gateway.identify import Identity, Unreadable, identify
from gateway.negotiate import STUDY_ROOT_FIND, VERIFICATION, is_storage_class
from gateway.part10 import file_header
from storage.ingest import Conflict, NotServing
from storage.model import Put
from storage.paths import is_uid
from storage.store import Store
from storage.upload import Upload
from storage.volume import NoRoom

log = structlog.get_logger()

IDENTIFIER_BYTES_MAX: Final = 1 << 20
FIND_BATCH: Final = 100


class Peer(Protocol):
    """The association as a service sees it."""

    calling_ae: str

    def send(self, context_id: int, command: bytes, data: bytes | None = None) -> None: ...
    async def drained(self) -> None: ...
    def cancelled(self, message_id: int) -> bool: ...


@dataclass(frozen=True)
class Services:
    """What the services work with."""

    store: Store
    settings: DicomSettings
    executor: Executor


@dataclass(frozen=True)
class Call:
    """A request in its presentation context."""

    peer: Peer
    context_id: int
    abstract_syntax: str
    transfer_syntax: str
    request: Request

    def answer(self, status: int, comment: str = "") -> None:
        self.peer.send(self.context_id, encode_response(self.request, status, comment=comment))


class Receiver(Protocol):
    def feed(self, view: memoryview) -> None: ...
    @property
    def backlogged(self) -> bool: ...
    async def room(self) -> None: ...
    async def respond(self) -> None: ...
    async def abandon(self) -> None: ...


class Refuser:
    """Reads a request to its end and answers with a fixed status."""

    def __init__(self, call: Call, status: int, comment: str = "") -> None:
        self._call, self._status, self._comment = call, status, comment

    backlogged = False

    def feed(self, view: memoryview) -> None:
        pass

    async def room(self) -> None:
        pass

    async def respond(self) -> None:
        self._call.answer(self._status, self._comment)

    async def abandon(self) -> None:
        pass


class Finder(Refuser):
    """C-FIND (PS3.4 C.4.1)."""

    def __init__(self, call: Call, services: Services) -> None:
        super().__init__(call, Status.CANNOT_UNDERSTAND, "identifier too long")
        self._services = services
        self._identifier = bytearray()

    def feed(self, view: memoryview) -> None:
        if len(self._identifier) <= IDENTIFIER_BYTES_MAX:
            self._identifier += view

    async def respond(self) -> None:
        call, services = self._call, self._services
        if len(self._identifier) > IDENTIFIER_BYTES_MAX:
            call.answer(self._status, self._comment)
            return
        try:
            query = Query(decode_identifier(bytes(self._identifier), call.transfer_syntax), services.settings.aet)
        except BadQuery as error:
            call.answer(Status.DATA_SET_MISMATCH, str(error))
            return
        loop = asyncio.get_running_loop()
        await services.store.settled()
        answers = query.run(services.store.catalogue)
        sent = 0
        while True:
            batch = await loop.run_in_executor(services.executor, lambda: list(islice(answers, FIND_BATCH)))
            if call.peer.cancelled(call.request.message_id):
                call.answer(Status.CANCEL)
                return
            if not services.store.may_serve:  # looked at after reading: a stopped process must not tell old news
                raise NotServing("no longer the primary")
            for answer in batch:
                pending = encode_response(call.request, Status.PENDING, has_data=True)
                call.peer.send(call.context_id, pending, encode_identifier(answer, call.transfer_syntax))
            await call.peer.drained()
            sent += len(batch)
            if len(batch) < FIND_BATCH:
                break
            if sent >= services.settings.query_limit:
                call.answer(Status.OUT_OF_RESOURCES, "more matches than the limit; narrow the query")
                return
        call.answer(Status.SUCCESS)


class Storer:
    """C-STORE (PS3.4 B.2): bytes to the disk and the peer as they come; Success once both hold them durably."""

    def __init__(self, call: Call, services: Services, upload: Upload) -> None:
        self._call, self._services, self._upload = call, services, upload
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
            self._identity = identify(incoming.first or b"", self._call.transfer_syntax, whole=whole)
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
        upload, incoming, store = self._upload, self._upload.incoming, self._services.store
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
        incoming = self._upload.incoming
        await incoming.finish()

        def read() -> Identity | None:
            with (incoming.volume.path / "spool" / incoming.spool).open("rb") as file:
                file.seek(incoming.offset)
                return identify(file, self._call.transfer_syntax, whole=True)

        identity = await asyncio.get_running_loop().run_in_executor(self._services.executor, read)
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


def receiver(call: Call, services: Services) -> Receiver:
    """Who deals with this request. A refusal still reads the data set to its end."""
    request = call.request
    if request.field == Command.C_ECHO_RQ and call.abstract_syntax == VERIFICATION:
        return Refuser(call, Status.SUCCESS)
    if request.field == Command.C_STORE_RQ:
        return _storer(call, services)
    if request.field == Command.C_FIND_RQ and call.abstract_syntax == STUDY_ROOT_FIND:
        if not request.has_data:
            return Refuser(call, Status.DATA_SET_MISMATCH, "no identifier")
        if not services.store.may_serve:
            return Refuser(call, Status.OUT_OF_RESOURCES, "not the primary now")
        return Finder(call, services)
    return Refuser(call, Status.UNRECOGNIZED_OPERATION, "not a service of this presentation context")


def _storer(call: Call, services: Services) -> Receiver:
    request = call.request
    if not is_storage_class(call.abstract_syntax, services.settings):
        return Refuser(call, Status.NO_SUCH_SOP_CLASS, "not a storage presentation context")
    if request.sop_class != call.abstract_syntax:
        return Refuser(call, Status.SOP_CLASS_NOT_SUPPORTED, "SOP Class UID doesn't fit the presentation context")
    if not request.has_data:
        return Refuser(call, Status.DATA_SET_MISMATCH, "no data set")
    header = file_header(request.sop_class, request.sop_instance[:64], call.transfer_syntax, call.peer.calling_ae)
    try:
        return Storer(call, services, services.store.begin(header))
    except NotServing:
        return Refuser(call, Status.OUT_OF_RESOURCES, "not the primary now")
    except NoRoom as error:
        return Refuser(call, Status.OUT_OF_RESOURCES, str(error))
