"""C-FIND as a service: pending responses in batches, cancel, limits."""

import asyncio
import time
from collections.abc import Iterator
from typing import Final

import structlog
from pydicom import Dataset

from conf.telling import place_of
from gateway.archive.answers import Query
from gateway.archive.find import Extended, Row
from gateway.dicom.dimse import Status, encode_response
from gateway.dicom.heads import HEAD_BYTES_MAX, read_head
from gateway.dicom.identifiers import BadQuery, encode_identifier
from gateway.dicom.sop_classes import FIND_MODELS
from gateway.dimse.service import Collector
from storage.state.model import Instance
from storage.store import NotServing, Store

log = structlog.get_logger()

FIND_BATCH: Final = 100
TOO_MUCH: Final = "too much to search: add a Patient ID, accession or study date"  # 64 characters at most
SLICE_S: Final = 0.2  # of a query thread, before others have their turn and a cancel is looked at


class Finder(Collector):
    async def respond(self) -> None:
        call, context = self.call, self._context
        agreed = call.peer.negotiated.extended if call.peer.negotiated else {}
        try:
            query = await self._read(
                Query,
                FIND_MODELS[call.abstract_syntax],
                context.settings,
                agreed.get(call.abstract_syntax, Extended()),
                context.store.rows,
                lambda instance: head(context.store, instance),
                context.store.is_unreadable,
            )
        except BadQuery as error:
            call.answer(Status.DATA_SET_MISMATCH, str(error))
            return
        await context.store.settled()
        await self._answer(query)

    async def _answer(self, query: Query) -> None:
        call, context = self.call, self._context
        loop, settings = asyncio.get_running_loop(), context.settings
        found, sent, ended, searched_s = query.matches(), 0, False, 0.0
        pending = Status.PENDING_OPTIONAL_KEYS if query.ignored else Status.PENDING
        response = encode_response(call.request, pending, has_data=True)
        while not ended:
            batch, ended, took_s = await loop.run_in_executor(context.executor, self._batch, query, found)
            searched_s = 0.0 if batch else searched_s + took_s
            if call.peer.cancelled(call.request.message_id):
                call.answer(Status.CANCEL)
                return
            if not context.store.may_read:  # looked at after reading: a stopped process must not tell old news
                raise NotServing("no longer the primary")
            for answer in batch[: settings.query_limit - sent]:
                call.peer.send(call.context_id, response, answer)
            await call.peer.drained(settings.message_timeout_s)
            sent += len(batch)
            call.outcome.count = min(sent, settings.query_limit)
            if sent > settings.query_limit:
                call.answer(Status.OUT_OF_RESOURCES, "more matches than the limit; narrow the query")
                return
            if searched_s > settings.query_search_s and not ended:
                call.answer(Status.OUT_OF_RESOURCES, TOO_MUCH)
                return
        call.answer(Status.SUCCESS)

    def _batch(self, query: Query, found: Iterator[Row | None]) -> tuple[list[bytes], bool, float]:
        """Some encoded answers, whether those were the last, and how many seconds it took; not more than a moment's
        work. Blocks."""
        begun = time.monotonic()
        query.until = begun + SLICE_S
        batch: list[bytes] = []
        for row in found:
            if row is not None:
                encoded = query.encoded(row, self.call.transfer_syntax) or self._encoded(query, query.answer(row))
                if encoded is not None:
                    batch.append(encoded)
            if len(batch) >= FIND_BATCH or time.monotonic() > query.until:
                return batch, False, time.monotonic() - begun
        return batch, True, time.monotonic() - begun

    def _encoded(self, query: Query, answer: Dataset) -> bytes | None:
        """One stored value that can't be said never ends a query: that answer has its unique keys only, or is left
        out."""
        for made in (lambda one: one, query.in_utf_8, query.bare):
            try:
                return encode_identifier(made(answer), self.call.transfer_syntax)
            except Exception as error:  # pydicom raises whatever a strange value leads it to
                log.error("query.answer", error=place_of(error))
        return None


def head(store: Store, instance: Instance) -> Dataset | None:
    """The attributes of a stored instance but for its pixels, from this node's copy. Blocks."""
    raw = store.beginning(instance, HEAD_BYTES_MAX)
    return None if raw is None else read_head(raw, instance.put.offset, instance.put.transfer_syntax)
