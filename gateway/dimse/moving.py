"""Instances on their way to a destination, over as many associations as it takes and may be."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import structlog

from gateway.archive.destinations import Destination
from gateway.dicom.associate import CONTEXTS_MAX
from gateway.dicom.sop_classes import UNCOMPRESSED
from gateway.dimse.context import Context
from gateway.dimse.delivery import Delivery, Sending, Tally
from gateway.dimse.requestor import Requestor, Unreachable
from storage.state.model import Instance

log = structlog.get_logger()

Kind = tuple[str, str]  # (SOP class, transfer syntax)


@dataclass
class Move:
    """`stop()`: no more is to be sent; `progress()` is called after each instance."""

    context: Context
    destination: Destination
    priority: int
    originator: tuple[str, int]
    tally: Tally
    stop: Callable[[], bool]
    progress: Callable[[], None]
    asking: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    given_up: bool = field(default=False, init=False)  # nothing gets there

    async def run(self, found: list[Instance]) -> None:
        """The contexts of one association are limited, so there may be several after one another; and several at once,
        if the settings say so. What one leaves is for the others."""
        for group in _groups(found):
            todo, contexts = deque(group), _contexts(_kinds(group))
            at_once = 0 if self.given_up else min(self.destination.settings.associations, len(group))
            async with asyncio.TaskGroup() as lanes:
                for _ in range(at_once):
                    lanes.create_task(self._lane(todo, contexts))
            if self.stop():
                return
            self.given_up |= bool(todo)
            for instance in todo:
                self.tally.fail(instance.put.sop_instance)

    async def _lane(self, todo: deque[Instance], contexts: list[tuple[str, tuple[str, ...]]]) -> None:
        """One association after the other, until nothing is left, or nothing gets through: others may get it there."""
        while todo and not self.stop() and await self._over_one(todo, contexts):
            pass

    async def _over_one(self, todo: deque[Instance], contexts: list[tuple[str, tuple[str, ...]]]) -> bool:
        """Over one association, until it ends. Returns whether another one is worth it."""
        context, destination = self.context, self.destination
        try:
            async with self.asking:  # one that takes few is not asked for all of them at once
                association = await Requestor.associate(
                    context.settings.aet, destination, contexts, source=context.settings.move_from
                )
        except Unreachable as error:
            log.warning("retrieve.unreachable", destination=destination.aet, why=str(error))
            return False
        agreed = {kind: number for number, kind in association.contexts.items()}
        delivery = Delivery(
            association, agreed, association.window, destination.timeout_s, self.priority, self.originator
        )
        sending = Sending(delivery, context, self.tally, self.stop, self.progress)
        try:
            await sending.run(todo)
        finally:
            await association.release()
        return sending.got_through or not sending.ended


def _kinds(found: list[Instance]) -> Iterator[Kind]:
    return ((one.put.sop_class, one.put.transfer_syntax) for one in found)


def _groups(found: list[Instance]) -> list[list[Instance]]:
    """Instances by association, each with no more presentation contexts than there may be."""
    groups: list[list[Instance]] = []
    kinds: set[Kind] = set()
    for instance in found:
        kind = (instance.put.sop_class, instance.put.transfer_syntax)
        if not groups or (kind not in kinds and len(_contexts({*kinds, kind})) > CONTEXTS_MAX):
            groups.append([])
            kinds = set()
        kinds.add(kind)
        groups[-1].append(instance)
    return groups


def _contexts(kinds: Iterable[Kind]) -> list[tuple[str, tuple[str, ...]]]:
    """One context for each SOP class and transfer syntax that is stored, and those for what may be converted to."""
    stored = list(dict.fromkeys(kinds))
    others = [(sop_class, syntax) for sop_class in dict.fromkeys(kind[0] for kind in stored) for syntax in UNCOMPRESSED]
    return [(sop_class, (syntax,)) for sop_class, syntax in dict.fromkeys(stored + others)]
