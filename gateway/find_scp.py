"""C-FIND as a service: pending responses in batches, cancel, limits."""

import asyncio
from itertools import islice
from typing import Final

from pydicom import Dataset, dcmread

from gateway.dimse import Status, encode_response
from gateway.find import Query
from gateway.negotiate import Extended
from gateway.query import BadQuery, decode_identifier, encode_identifier
from gateway.services import Collector
from gateway.sop_classes import FIND_MODELS
from storage.ingest import NotServing
from storage.model import Instance
from storage.store import Store

FIND_BATCH: Final = 100


class Finder(Collector):
    async def respond(self) -> None:
        call, services = self._call, self._services
        if self.too_long:
            call.answer(Status.UNABLE_TO_PROCESS, "identifier too long")
            return
        agreed = call.peer.negotiated.extended if call.peer.negotiated else {}
        try:
            query = Query(
                decode_identifier(bytes(self._collected), call.transfer_syntax),
                FIND_MODELS[call.abstract_syntax],
                services.settings,
                agreed.get(call.abstract_syntax, Extended()),
                services.store.catalogue,
                lambda instance: head(services.store, instance),
            )
        except BadQuery as error:
            call.answer(Status.DATA_SET_MISMATCH, str(error))
            return
        await services.store.settled()
        await self._answer(query)

    async def _answer(self, query: Query) -> None:
        call, services = self._call, self._services
        loop = asyncio.get_running_loop()
        answers, sent = query.run(), 0
        pending = Status.PENDING_OPTIONAL_KEYS if query.ignored else Status.PENDING
        response = encode_response(call.request, pending, has_data=True)
        while True:
            batch = await loop.run_in_executor(services.executor, lambda: list(islice(answers, FIND_BATCH)))
            if call.peer.cancelled(call.request.message_id):
                call.answer(Status.CANCEL)
                return
            if not services.store.may_read:  # looked at after reading: a stopped process must not tell old news
                raise NotServing("no longer the primary")
            for answer in batch[: services.settings.query_limit - sent]:
                call.peer.send(call.context_id, response, encode_identifier(answer, call.transfer_syntax))
            await call.peer.drained()
            sent += len(batch)
            if sent > services.settings.query_limit:
                call.answer(Status.OUT_OF_RESOURCES, "more matches than the limit; narrow the query")
                return
            if len(batch) < FIND_BATCH:
                break
        call.answer(Status.SUCCESS)


def head(store: Store, instance: Instance) -> Dataset | None:
    """The attributes of a stored instance but for its pixels, from this node's copy. Blocks."""
    found = store.copies.find(instance.seq)
    if found is None:
        return None
    volume, name, _ = found
    try:
        return dcmread(volume.path / name, stop_before_pixels=True, defer_size=1 << 16)
    except Exception:  # pydicom raises whatever a strange data set leads it to; then it has no such attributes
        return None
