"""The DICOM server: listens, bounds connections and associations, and knows what the services work with."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import structlog
from pynetdicom.pdu import A_ASSOCIATE_RQ

from conf.settings import DicomSettings
from gateway.archive.converting import Converter
from gateway.archive.destinations import Destinations
from gateway.archive.jobs import Jobs
from gateway.dimse.association import Association
from gateway.dimse.commitments import COMMITMENT_TASK, Commitments
from gateway.dimse.context import Context
from gateway.dimse.negotiate import BUSY, NOT_NOW, Negotiated, Rejection, negotiate, wants_to_read
from gateway.dimse.retrieve_scp import MOVE_TASK, finish_move
from storage.store import Store

log = structlog.get_logger()

QUERY_THREADS: Final = 2
BACKLOG: Final = 128


class DicomServer:
    def __init__(self, store: Store, settings: DicomSettings) -> None:
        self.settings = settings
        self._store = store
        self._executor = ThreadPoolExecutor(QUERY_THREADS, "query")
        self._context = self._new_context()
        self._connections: set[Association] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None
        store.serve(stepped_down=self.abort_all, drain=self._drain, busy=self._busy)

    def _new_context(self) -> Context:
        store, settings, destinations = self._store, self.settings, Destinations(self.settings)
        jobs, commitments = Jobs(store), Commitments(store, settings, destinations, self._executor)
        context = Context(store, settings, self._executor, Converter(), jobs, destinations, commitments)
        jobs.handle(COMMITMENT_TASK, commitments.carry_out)
        jobs.handle(MOVE_TASK, lambda task: finish_move(context, task))
        return context

    def _busy(self) -> int:
        return sum(association.busy for association in self._connections)

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        address, port = self.settings.bind or None, self.settings.port
        self._server = await loop.create_server(
            lambda: Association(self, self._context), address, port, backlog=BACKLOG, reuse_address=True
        )
        self.spawn(self._context.jobs.run())
        log.info("dicom.listening", address=self.settings.bind or "all", port=self.settings.port, aet=self.settings.aet)

    async def stop(self) -> None:
        if self._server:
            self._server.close()
        self.abort_all()
        for task in list(self._tasks):
            task.cancel()
        self._executor.shutdown(wait=False)

    def abort_all(self) -> None:
        """Another node has taken over, or this one stops: senders connect anew and send again."""
        for association in list(self._connections):
            association.abort("this node serves no longer")

    @property
    def draining(self) -> bool:
        """A switchover is near: nothing new is taken."""
        return self._store.draining

    def _drain(self) -> None:
        log.info("dicom.draining", connections=len(self._connections))
        for association in list(self._connections):
            association.drain()

    def note_drained(self) -> None:
        """The agent waits for the last request."""
        self._store.note_drained()

    def admit(self, association: Association) -> bool:
        if len(self._connections) >= self.settings.max_connections:
            log.warning("dicom.connections", limit=self.settings.max_connections)
            return False
        self._connections.add(association)
        return True

    def forget(self, association: Association) -> None:
        self._connections.discard(association)

    def negotiate(self, request: A_ASSOCIATE_RQ) -> Negotiated | Rejection:
        if not self._store.serving and not (self._store.may_read and wants_to_read(request)):
            return NOT_NOW
        if self.draining:
            return BUSY
        if sum(connection.established for connection in self._connections) >= self.settings.max_associations:
            return BUSY
        return negotiate(request, self.settings)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
