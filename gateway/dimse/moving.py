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
    over: asyncio.Event = field(default_factory=asyncio.Event, init=False)  # nothing is left, nobody is sending
    connected: int = field(default=0, init=False)  # associations that are there now
    sent: int = field(default=0, init=False)  # associations that got something through
    unreachable: bool = field(default=False, init=False)  # when it was asked last, and no association was there

    async def run(self, found: list[Instance]) -> None:
        """The contexts of one association are limited, so there may be several after one another; and several at once,
        if the settings say so. What one leaves is for the others."""
        for group in _groups(found):
            todo, contexts = deque(group), _contexts(_kinds(group))
            at_once = min(self.destination.settings.associations, len(group))
            while todo and not self.stop() and not self.unreachable:
                before = self.sent
                self.over.clear()
                async with asyncio.TaskGroup() as lanes:
                    for _ in range(at_once):
                        lanes.create_task(self._lane(todo, contexts))
                if self.sent == before:
                    break
                at_once = 1  # for what one has left after the others had ended
            if self.stop():
                return
            for instance in todo:
                self.tally.fail(instance.put.sop_instance)

    async def _lane(self, todo: deque[Instance], contexts: list[tuple[str, tuple[str, ...]]]) -> None:
        """One association after the other, until nothing is left, or nothing gets through: others may get it there."""
        while association := await self._associated(todo, contexts):
            self.connected += 1
            agreed = {kind: number for number, kind in association.contexts.items()}
            timeout_s = self.destination.timeout_s
            delivery = Delivery(association, agreed, association.window, timeout_s, self.priority, self.originator)
            sending = Sending(delivery, self.context, self.tally, self.stop, self.progress)
            try:
                await sending.run(todo)
            finally:
                await association.release()
                self.connected -= 1
                if not self.connected and not todo:
                    self.over.set()
            self.sent += sending.got_through
            if sending.ended and not sending.got_through:
                return

    async def _associated(self, todo: deque[Instance], contexts: list[tuple[str, tuple[str, ...]]]) -> Requestor | None:
        """None if there is nothing to be sent, or nobody lets us in. One that takes few associations isn't asked for
        all of them at once."""
        context, destination = self.context, self.destination
        async with self.asking:
            if not todo or self.stop() or self.unreachable:
                return None
            others = self.connected
            asking = asyncio.ensure_future(
                Requestor.associate(context.settings.aet, destination, contexts, source=context.settings.move_from)
            )
            over = asyncio.ensure_future(self.over.wait())  # it isn't waited for longer than there is something to send
            try:
                await asyncio.wait((asking, over), return_when=asyncio.FIRST_COMPLETED)
                return await asking if asking.done() else None
            except Unreachable as error:
                log.warning("retrieve.unreachable", destination=destination.aet, why=str(error))
                self.unreachable = not (others or self.connected)
                return None
            finally:
                for one in (asking, over):
                    one.cancel()
                await asyncio.wait((asking, over))


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
