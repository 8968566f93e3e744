"""C-FIND as a service: pending responses in batches, cancel, limits."""

import asyncio
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Final

from pydicom import Dataset, dcmread

from gateway.archive.find import Extended, Query
from gateway.dicom.dimse import Status, encode_response
from gateway.dicom.identifiers import BadQuery, encode_identifier
from gateway.dicom.sop_classes import FIND_MODELS
from gateway.dimse.service import Collector
from storage.state.model import Instance
from storage.store import NotServing, Store

FIND_BATCH: Final = 100
HEAD_BYTES_MAX: Final = 4 << 20
SLICE_S: Final = 0.2  # of a query thread, before others have their turn and a cancel is looked at


class Finder(Collector):
    async def respond(self) -> None:
        call, context = self._call, self._context
        agreed = call.peer.negotiated.extended if call.peer.negotiated else {}
        try:
            query = Query(
                await self._identifier(),
                FIND_MODELS[call.abstract_syntax],
                context.settings,
                agreed.get(call.abstract_syntax, Extended()),
                context.store.rows,
                lambda instance: head(context.store, instance),
            )
        except BadQuery as error:
            call.answer(Status.DATA_SET_MISMATCH, str(error))
            return
        await context.store.settled()
        await self._answer(query)

    async def _answer(self, query: Query) -> None:
        call, context = self._call, self._context
        loop, limit = asyncio.get_running_loop(), context.settings.query_limit
        answers, sent, ended = query.run(), 0, False
        pending = Status.PENDING_OPTIONAL_KEYS if query.ignored else Status.PENDING
        response = encode_response(call.request, pending, has_data=True)
        while not ended:
            batch, ended = await loop.run_in_executor(context.executor, self._batch, query, answers)
            if call.peer.cancelled(call.request.message_id):
                call.answer(Status.CANCEL)
                return
            if not context.store.may_read:  # looked at after reading: a stopped process must not tell old news
                raise NotServing("no longer the primary")
            for answer in batch[: limit - sent]:
                call.peer.send(call.context_id, response, answer)
            await call.peer.drained()
            sent += len(batch)
            if sent > limit:
                call.answer(Status.OUT_OF_RESOURCES, "more matches than the limit; narrow the query")
                return
        call.answer(Status.SUCCESS)

    def _batch(self, query: Query, answers: Iterator[Dataset | None]) -> tuple[list[bytes], bool]:
        """Some encoded answers, and whether those were the last; not more than a moment's work. Blocks."""
        query.until = time.monotonic() + SLICE_S
        batch: list[bytes] = []
        for answer in answers:
            if answer is not None:
                batch.append(encode_identifier(answer, self._call.transfer_syntax))
            if len(batch) >= FIND_BATCH or time.monotonic() > query.until:
                return batch, False
        return batch, True


def head(store: Store, instance: Instance) -> Dataset | None:
    """The attributes of a stored instance but for its pixels, from this node's copy. Blocks."""
    raw = store.beginning(instance, HEAD_BYTES_MAX)
    if raw is None:
        return None
    try:
        return dcmread(BytesIO(raw), stop_before_pixels=True, defer_size=1 << 16)
    except Exception:  # pydicom raises whatever a strange data set leads it to; then it has no such attributes
        return None
