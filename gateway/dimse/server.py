"""The DICOM server: listens, bounds connections and associations, and knows what the services work with."""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import structlog

from conf.settings import DicomSettings
from conf.telling import place_of
from gateway.archive.budget import Budget
from gateway.archive.converting import Converter
from gateway.archive.destinations import Destinations
from gateway.archive.jobs import Jobs
from gateway.archive.keeping import KeptHeads
from gateway.archive.live import Live
from gateway.archive.queries import Queries
from gateway.archive.users import Overrun, Users
from gateway.dicom.associate import AssociateRequest
from gateway.dimse.association import Association
from gateway.dimse.commitments import COMMITMENT_TASK, Commitments
from gateway.dimse.context import Context
from gateway.dimse.negotiate import (
    BUSY,
    DRAINING,
    NOT_LET_IN,
    NOT_NOW,
    Negotiated,
    Rejection,
    negotiate,
    refusal,
    user_of,
    wants_to_read,
    wants_to_store,
)
from gateway.dimse.retrieve_scp import MOVE_TASK, finish_move, lane_of
from gateway.metrics import Meter
from gateway.workers.pool import Pool
from storage.store import Store

log = structlog.get_logger()

QUERY_THREADS: Final = 2
READERS: Final = 2  # worker processes for odd data sets
BACKLOG: Final = 128
SILENT_S: Final = 10.0  # an association that has been idle so long makes room for one that is asked for


class DicomServer:
    def __init__(
        self, store: Store, settings: DicomSettings, meter: Meter, trusted: frozenset[str] = frozenset()
    ) -> None:
        """`trusted`: addresses of the other node, which needn't log in: it holds the archive itself."""
        self._store, self._meter, self._trusted = store, meter, trusted
        self._live = Live(settings)
        self._users = Users(settings.users)
        self._executor = ThreadPoolExecutor(QUERY_THREADS, "query")
        self.kept_heads = KeptHeads(settings.keep_heads)
        self._context = self._new_context()
        self._connections: set[Association] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None
        store.serve(stepped_down=self.abort_all, drain=self._drain, busy=self._busy)

    def _new_context(self) -> Context:
        store, live, destinations = self._store, self._live, Destinations(self._live)
        jobs, commitments = Jobs(store), Commitments(store, live, destinations, self._executor)
        context = Context(
            store,
            live,
            self._executor,
            Queries(store, live.dicom.query_processes, self.kept_heads),
            Pool(READERS),
            Converter(),
            Budget(live.dicom.retrieve_memory_bytes),
            jobs,
            destinations,
            commitments,
            self._meter,
            self.spawn,
        )
        jobs.handle(COMMITMENT_TASK, commitments.carry_out)
        jobs.handle(MOVE_TASK, lambda task: finish_move(context, task), lane_of)
        return context

    @property
    def settings(self) -> DicomSettings:
        """Those in force now."""
        return self._live.dicom

    def reload(self, settings: DicomSettings) -> None:
        """From now on these hold; what is under way ends by the ones it began with."""
        self._live.dicom = settings
        self._users = Users(settings.users)

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
        await self._context.queries.stop()
        await self._context.readers.stop()
        await self._context.converter.stop()

    def abort_all(self) -> None:
        """Another node has taken over, or this one stops: senders connect anew and send again."""
        for association in list(self._connections):
            association.abort("this node serves no longer")

    def queues(self) -> dict[str, int]:
        """What waits, and for what: jobs for disks, data sets to be read by a worker, objects to be converted."""
        context = self._context
        return {
            "disks": self._store.waiting,
            "queries": context.queries.waiting,
            "readers": context.readers.waiting,
            "converter": context.converter.pool.waiting,
        }

    # -- switchover --------------------------------------------------------------------------------------------

    def _busy(self) -> int:
        return sum(association.busy for association in self._connections)

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

    # -- who comes in ------------------------------------------------------------------------------------------

    def admit(self, association: Association) -> bool:
        """A new connection. The oldest that has said nothing makes room where there is none."""
        settings, address = self.settings, association.address
        of_address = [one for one in self._connections if one.address == address]
        most = settings.max_connections_per_address
        if len(of_address) >= most and not self._make_room([one for one in of_address if not one.established]):
            log.warning("dicom.connections", address=address, limit=most)
            return False
        silent = [one for one in self._connections if not one.established]
        if len(self._connections) >= settings.max_connections and not self._make_room(silent):
            log.warning("dicom.connections", address=address, limit=settings.max_connections)
            return False
        self._connections.add(association)
        return True

    def _make_room(self, silent: list[Association]) -> bool:
        """End the one that has been silent for longest."""
        if not silent:
            return False
        oldest = min(silent, key=lambda one: one.since)
        oldest.abort("room is needed for others")
        self._connections.discard(oldest)
        return True

    def forget(self, association: Association) -> None:
        self._connections.discard(association)

    async def answer(self, association: Association, request: AssociateRequest) -> Negotiated | Rejection:
        """Whether an association comes about, and on which terms."""
        answer = await self._answer(association, request)
        self._meter.association("rejected" if isinstance(answer, Rejection) else "accepted")
        return answer

    async def _answer(self, association: Association, request: AssociateRequest) -> Negotiated | Rejection:
        if rejection := self._no_entry(association, request):
            return rejection
        asked = self._users.wanted and association.address not in self._trusted
        if asked and (rejection := await self._log_in(request) or self._no_entry(association, request)):
            return rejection
        return negotiate(request, self.settings)

    def _no_entry(self, association: Association, request: AssociateRequest) -> Rejection | None:
        if not self._store.serving and not (self._store.may_read and wants_to_read(request)):
            return NOT_NOW
        if self.draining:
            return DRAINING
        return refusal(request, self.settings) or self._no_slot(association, request)

    def _no_slot(self, association: Association, request: AssociateRequest) -> Rejection | None:
        """Slots are for all, but some for those who store, and not all for one address."""
        settings = self.settings
        there = [one for one in self._connections if one.established]
        of_address = Counter(one.address for one in there)[association.address]
        most = settings.max_associations
        if not wants_to_store(request, settings):
            most -= min(settings.storing_reserve, most // 4)
        if of_address >= settings.max_associations_per_address:
            there = [one for one in there if one.address == association.address]
        elif len(there) < most:
            return None
        now = asyncio.get_running_loop().time()
        if self._make_room([one for one in there if one.quiet and now - one.since > SILENT_S]):
            return None
        log.warning("dicom.associations", limit=settings.max_associations, **association.who)
        return BUSY

    async def _log_in(self, request: AssociateRequest) -> Rejection | None:
        identity = request.user.identity
        if identity is None or identity.kind != 2:
            return NOT_LET_IN
        try:
            good = await self._users.may_log_in(user_of(identity), identity.secondary)
        except Overrun:
            return BUSY
        return None if good else NOT_LET_IN

    # -- tasks -------------------------------------------------------------------------------------------------

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("task.ended", error=place_of(error))
