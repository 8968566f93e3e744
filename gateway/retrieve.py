"""C-GET and C-MOVE (PS3.4 C.4.2, C.4.3): which instances, and sending them one after the other, some read ahead."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog
from pydicom import Dataset

from gateway.connection import AssociationEnded
from gateway.dimse import Request, is_failure
from gateway.query import UNIQUE, BadQuery, level_of, values_of
from gateway.requestor import store_request, whole
from gateway.services import Services
from gateway.sop_classes import Model
from gateway.transcode import TARGETS, CannotConvert, convert
from storage.catalogue import Catalogue
from storage.model import Instance
from storage.reading import Source, Unavailable

log = structlog.get_logger()

READ_AHEAD: Final = 2
CONVERTED_BYTES_MAX: Final = 1 << 29


# -- which -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """The unique keys of a retrieve request; () where a level wasn't given."""

    level: str
    keys: Mapping[str, tuple[str, ...]]  # level -> values


def wanted(identifier: Dataset, model: Model) -> Wanted:
    """Raises BadQuery."""
    level = level_of(identifier, model)
    levels = model.levels if "PATIENT" in model.levels else ("PATIENT", *model.levels)
    keys = {one: tuple(values_of(identifier, UNIQUE[one])) for one in levels}
    if not keys[level]:
        raise BadQuery(f"{UNIQUE[level]} is needed at level {level}")
    if any("*" in value or "?" in value for values in keys.values() for value in values):
        raise BadQuery("a retrieve takes unique keys, no wild cards")
    if level == "PATIENT" and len(keys["PATIENT"]) > 1:
        raise BadQuery("one PatientID at level PATIENT")
    return Wanted(level, {one: keys[one] for one in levels[: levels.index(level) + 1]})


def instances(catalogue: Catalogue, wanted: Wanted) -> Iterator[Instance]:
    """What is stored of it. Blocks."""
    if wanted.level == "IMAGE":
        for uid in wanted.keys["IMAGE"]:
            found = catalogue.instance(uid)
            if found and _fits(found, wanted):
                yield found
        return
    for study in _studies(catalogue, wanted):
        series_wanted = wanted.keys.get("SERIES", ())
        for series, _ in catalogue.series_of(study):
            if not series_wanted or series in series_wanted:
                yield from (one for one in catalogue.instances_of(study, series) if _fits(one, wanted))


def _studies(catalogue: Catalogue, wanted: Wanted) -> Iterator[str]:
    if given := wanted.keys.get("STUDY", ()):
        yield from given
    elif patient := wanted.keys.get("PATIENT", ()):
        yield from (uid for uid, _ in catalogue.studies(patient[0]))
    else:  # relational: by series alone
        yield from (uid for uid, _ in catalogue.studies())


def _fits(instance: Instance, wanted: Wanted) -> bool:
    put = instance.put
    has = {"STUDY": put.study, "SERIES": put.series, "PATIENT": put.keys.get("PatientID", "")}
    return all(not wanted.keys.get(level) or value in wanted.keys[level] for level, value in has.items())


# -- sending -----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Sub-operations, as the responses count them."""

    remaining: int
    completed: int = 0
    failed: int = 0
    warning: int = 0
    failed_uids: list[str] = field(default_factory=list)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        return self.remaining, self.completed, self.failed, self.warning

    def fail(self, uid: str) -> None:
        self.remaining -= 1
        self.failed += 1
        self.failed_uids.append(uid)

    def answered(self, uid: str, status: int) -> None:
        if is_failure(status):
            self.fail(uid)
            return
        self.remaining -= 1
        if status:
            self.warning += 1
        else:
            self.completed += 1


class Sender(Protocol):
    async def invoke(
        self, context_id: int, elements: dict[int, int | str], data: AsyncIterator[memoryview], timeout_s: float
    ) -> Request: ...


@dataclass(frozen=True)
class Delivery:
    """How instances go over one association."""

    sender: Sender
    contexts: Mapping[tuple[str, str], int]  # (SOP class, transfer syntax) -> presentation context
    window: int  # requests under way at once
    timeout_s: float
    priority: int
    originator: tuple[str, int] | None

    def context_of(self, sop_class: str, transfer_syntax: str) -> tuple[int, str] | None:
        """(context, transfer syntax): as stored if that was agreed on, or else something to convert to."""
        for syntax in (transfer_syntax, *TARGETS):
            number = self.contexts.get((sop_class, syntax))
            if number is not None:
                return number, syntax
        return None


class Sending:
    """Sends instances over an association until it has ended or `stop()` says so."""

    def __init__(
        self,
        delivery: Delivery,
        services: Services,
        tally: Tally,
        stop: Callable[[], bool],
        progress: Callable[[], None],
    ) -> None:
        self._delivery, self._services = delivery, services
        self._tally, self._stop, self._progress = tally, stop, progress
        self._turn = asyncio.Semaphore(delivery.window)
        self._ahead = asyncio.Semaphore(delivery.window + READ_AHEAD)
        self._ended = False
        self.unsent: list[Instance] = []

    async def run(self, found: list[Instance]) -> None:
        """What was neither sent nor failed is in `unsent` afterwards."""
        async with asyncio.TaskGroup() as group:
            for number, instance in enumerate(found):
                await self._ahead.acquire()
                if self._ended or self._stop():
                    self.unsent += found[number:]
                    return
                group.create_task(self._one(instance))

    async def _one(self, instance: Instance) -> None:
        put = instance.put
        try:
            agreed = self._delivery.context_of(put.sop_class, put.transfer_syntax)
            if agreed is None:
                self._failed(put.sop_instance, "no presentation context for it was agreed on")
                return
            source = await self._services.store.reading.open(instance)
            context_id, syntax = agreed
            data = source.blocks() if syntax == put.transfer_syntax else whole(await self._converted(source, syntax))
            async with self._turn:
                if self._ended or self._stop():
                    self.unsent.append(instance)
                    return
                await self._send(context_id, put.sop_class, put.sop_instance, data)
        except (Unavailable, CannotConvert, OSError) as error:
            self._failed(put.sop_instance, str(error))
        finally:
            self._ahead.release()
        self._progress()

    async def _send(self, context_id: int, sop_class: str, sop_instance: str, data: AsyncIterator[memoryview]) -> None:
        delivery = self._delivery
        command = store_request(sop_class, sop_instance, delivery.priority, delivery.originator)
        try:
            answer = await delivery.sender.invoke(context_id, command, data, delivery.timeout_s)
        except (AssociationEnded, TimeoutError, OSError) as error:
            self._ended = True  # a data set that broke off, or an answer that may come late: start anew
            self._failed(sop_instance, str(error) or "no answer in time")
            return
        if is_failure(answer.status):
            log.warning("retrieve.refused", status=f"0x{answer.status:04X}")
        self._tally.answered(sop_instance, answer.status)

    def _failed(self, sop_instance: str, why: str) -> None:
        log.warning("retrieve.failed", sop_instance=sop_instance, why=why)
        self._tally.fail(sop_instance)

    async def _converted(self, source: Source, syntax: str) -> bytes:
        put = source.put
        if put.length > CONVERTED_BYTES_MAX:
            raise CannotConvert(f"{put.length} bytes are too many to be converted")
        loop = asyncio.get_running_loop()
        async with self._services.converting:
            data = await source.whole()
            return await loop.run_in_executor(
                self._services.converter, convert, data, put.sop_class, put.sop_instance, put.transfer_syntax, syntax
            )
