"""C-FIND as a service: pending responses in batches, cancel, limits."""

from typing import Final

import structlog

from gateway.archive.asked import USED, Asked
from gateway.archive.find import Extended
from gateway.archive.queries import QueryFailed, Running
from gateway.dicom.dimse import Status, encode_response
from gateway.dicom.identifiers import BadQuery
from gateway.dimse.service import Collector
from storage.store import NotServing

log = structlog.get_logger()

TOO_MUCH: Final = "too much to search: add a Patient ID, accession or study date"  # 64 characters at most
UNREADABLE_MAX: Final = 1000  # told with a query
FAILED: Final = "the query could not be answered now; ask again"


class Finder(Collector):
    async def respond(self) -> None:
        if self.too_long:
            self.call.answer(Status.DATA_SET_MISMATCH, "too long")
            return
        await self._context.store.settled()
        running = self._context.queries.begin(self._asked())
        try:
            await self._answer(running)
        except BadQuery as error:
            self.call.answer(Status.DATA_SET_MISMATCH, str(error))
        except QueryFailed as error:
            log.error("query.failed", why=str(error), **self.call.peer.who)
            self.call.answer(Status.CANNOT_UNDERSTAND, FAILED)
        finally:
            running.close()

    def _asked(self) -> Asked:
        call, store, settings = self.call, self._context.store, self._context.settings
        agreed = call.peer.negotiated.extended if call.peer.negotiated else {}
        extended = agreed.get(call.abstract_syntax, Extended())
        return Asked(
            bytes(self._collected),
            call.transfer_syntax,
            call.abstract_syntax,
            (extended.relational, extended.date_time, extended.fuzzy_names),
            tuple(getattr(settings, name) for name in USED),
            store.for_other_processes(),
            tuple(store.unreadable) if len(store.unreadable) <= UNREADABLE_MAX else None,
            self._context.queries.kept.usable,
        )

    async def _answer(self, running: Running) -> None:
        call, context = self.call, self._context
        settings, sent, searched_s = context.settings, 0, 0.0
        while not running.ended:
            batch = await running.more()
            searched_s = 0.0 if batch.answers else searched_s + batch.took_s
            if call.peer.cancelled(call.request.message_id):
                call.answer(Status.CANCEL)
                return
            if not context.store.may_read:  # looked at after reading: a stopped process must not tell old news
                raise NotServing("no longer the primary")
            pending = Status.PENDING_OPTIONAL_KEYS if batch.ignored else Status.PENDING
            response = encode_response(call.request, pending, has_data=True)
            for answer in batch.answers[: settings.query_limit - sent]:
                call.peer.send(call.context_id, response, answer)
            await call.peer.drained(settings.message_timeout_s)
            sent += len(batch.answers)
            call.outcome.count = min(sent, settings.query_limit)
            if sent > settings.query_limit:
                call.answer(Status.OUT_OF_RESOURCES, "more matches than the limit; narrow the query")
                return
            if searched_s > settings.query_search_s and not batch.ended:
                call.answer(Status.OUT_OF_RESOURCES, TOO_MUCH)
                return
        call.answer(Status.SUCCESS)
