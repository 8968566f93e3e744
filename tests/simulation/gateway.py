"""A gateway process in the simulation: the real replication core and duty around a model disk and link."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from storage.control import Report, Tell
from storage.replication.duty import Duty
from storage.replication.effects import Adopt, DropLink, Effect, Limits, Persist, Publish, Send, SteppedDown, Transmit
from storage.replication.epochs import Epochs
from storage.replication.messages import AnyMessage, Prepare
from storage.replication.replica import Replica
from tests.simulation.virtual import Process

if TYPE_CHECKING:
    from tests.simulation.world import Connection, Node, World

LIMITS = Limits(state_after=25)


class SimGateway:
    core_class: type[Replica] = Replica

    def __init__(self, world: "World", node: "Node") -> None:
        self.world, self.node, self.disk = world, node, node.disk
        self.process = Process(f"gateway-{node.name}")
        disk = self.disk
        disk.incarnation += 1
        epochs = Epochs()
        for seq in sorted(disk.log):
            epochs.append(disk.log[seq][0], seq)
        self.core = self.core_class(
            node.name,
            node.peer,
            "sim",
            disk.store_id,
            disk.incarnation,
            disk.promised,
            epochs,
            epochs.last[1],
            disk.applied,
            limits=LIMITS,
        )
        self.core.grants.given_until = node.clock() + LIMITS.grant_s  # as the store does
        self.published = disk.applied
        self.contents = {disk.log[seq][1] for seq in range(1, disk.applied + 1)}
        self.duty = Duty(
            self.core,
            clock=node.clock,
            persist_promise=self._persist_promise,
            abandon=self._abandon,
            flush=self.flush,
        )
        self.connection: Connection | None = None
        self._memory: dict[int, tuple[int, bytes]] = {}
        self._waiting: dict[int, Callable[[bool], None]] = {}
        self._disk_free_at = 0.0
        self._writing = 0
        self._told_at = 0.0

    def start(self) -> None:
        self.world.loop.spawn(self.process, self._run())

    async def _run(self) -> None:
        await asyncio.sleep(0.3)
        while True:
            self.core.tick(self.node.clock())
            self.flush()
            self.node.report(self.duty.report(self.disk.cluster_id))
            await asyncio.sleep(0.1)

    # -- agent -------------------------------------------------------------------------------------------------

    def tell(self, tell: Tell) -> None:
        if tell.cluster_id and not self.disk.cluster_id:
            self.disk.cluster_id = tell.cluster_id
        self.duty.tell(tell)
        self.node.report(self.duty.report(self.disk.cluster_id))

    async def _persist_promise(self, epoch: int) -> None:
        await asyncio.sleep(self._disk_delay())
        self.disk.promised = max(self.disk.promised, epoch)

    def _abandon(self) -> None:
        if not self.core.leading and self._writing == 0:
            self.core.abandon()

    # -- client ------------------------------------------------------------------------------------------------

    def put(self, payload: bytes, reply: Callable[[bool], None]) -> None:
        if not self.duty.may_serve:
            reply(False)
            return
        seq = self.core.propose(self.node.clock())
        self._memory[seq] = (self.core.epoch, payload)
        self._waiting[seq] = reply
        self._write(seq, self.core.epoch, payload)
        self.flush()

    def read(self) -> frozenset[bytes] | None:
        return frozenset(self.contents) if self.duty.may_serve else None

    # -- effects -----------------------------------------------------------------------------------------------

    def flush(self) -> None:
        for effect in self.core.take():
            self._carry_out(effect)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(message):
                self._send(message)
            case Transmit(session, first, last, commit):
                for seq in range(first, last + 1):
                    epoch, payload = self._memory.get(seq) or self.disk.log[seq]
                    self._send(Prepare(self.core.epoch, session, seq, epoch, commit, payload, 0))
            case Persist():
                self._write(effect.seq, effect.entry_epoch, effect.entry, owed=effect.owed)
            case Adopt():
                self._adopt(effect)
            case Publish(seq):
                self._publish(seq)
            case SteppedDown():
                self.duty.stepped_down()
                waiting, self._waiting = self._waiting, {}
                for reply in waiting.values():
                    reply(False)
            case DropLink():
                self.drop()

    def _disk_delay(self) -> float:
        rng = self.world.rng
        return 0.002 + rng.random() * 0.01 if rng.random() < 0.97 else rng.random() * 2

    def _in_order(self) -> float:
        """Delay of a write that comes after those before it."""
        now = self.world.loop.now
        self._disk_free_at = max(now, self._disk_free_at) + self._disk_delay()
        return self._disk_free_at - now

    def _write(self, seq: int, epoch: int, payload: bytes, *, owed: bool = False) -> None:
        self._writing += 1

        def written() -> None:
            if self.process.dead:
                return
            if self.disk.log and seq > max(self.disk.log) + 1:
                raise AssertionError("hole in the log")
            self.disk.log[seq] = (epoch, payload)
            (self.disk.owed.add if owed else self.disk.owed.discard)(seq)
            self._completed(done)

        def done() -> None:
            self._writing -= 1
            self._memory.pop(seq, None)
            self.core.persisted(seq)
            self.flush()

        self.world.loop.post(self.node.kernel, self._in_order(), written)

    def _completed(self, done: Callable[[], None]) -> None:
        """Tell the process that its write is durable; a crash may come in between."""
        rng, now = self.world.rng, self.world.loop.now
        self._told_at = max(self._told_at + 1e-6, now + rng.choice((0.0002, 0.0005, 0.02)))
        self.world.loop.post(self.process, self._told_at - now, done)

    def _adopt(self, effect: Adopt) -> None:
        def written() -> None:
            if self.process.dead:
                return
            self.disk.promised = max(self.disk.promised, effect.epoch)
            for seq in [seq for seq in self.disk.log if seq > effect.match]:
                del self.disk.log[seq]
            self._completed(lambda: self._take_state(effect) if effect.state else done(None))

        def done(state: tuple[tuple[int, int], ...] | None) -> None:
            self.core.adopted(effect.epoch, effect.match, state)
            self.flush()

        self.world.loop.post(self.node.kernel, self._in_order(), written)

    def _take_state(self, effect: Adopt) -> None:
        """What the leader has published by now, in one step, some time later; or nothing, if it can't be had."""
        leader, connection = self.world.nodes[self.node.peer].gateway, self.connection
        taken = {seq: leader.disk.log[seq] for seq in range(1, leader.published + 1)} if leader else {}
        epochs = Epochs()
        for seq, (epoch, _) in taken.items():
            epochs.append(epoch, seq)

        def written() -> None:
            there = leader is not None and not leader.process.dead and connection is not None
            if self.process.dead:
                return
            if not there or connection is not self.connection or epochs.last[1] < effect.match:
                self._completed(lambda: done(None))
                return
            self.disk.owed |= {seq for seq in taken if seq > effect.match}
            self.disk.log = dict(taken)
            self.disk.applied = epochs.last[1]
            self._completed(lambda: done(tuple(epochs.pairs)))

        def done(state: tuple[tuple[int, int], ...] | None) -> None:
            if state is not None:
                self._publish(epochs.last[1])
            self.core.adopted(effect.epoch, effect.match, state)
            self.flush()

        self.world.loop.post(self.node.kernel, self._in_order() + self.world.rng.random() * 6, written)

    def _publish(self, upto: int) -> None:
        for seq in range(self.published + 1, upto + 1):
            epoch, payload = self._memory.get(seq) or self.disk.log[seq]
            self.world.checker.published(self.node.name, seq, epoch, payload)
            self.contents.add(payload)
            self.published = seq
            reply = self._waiting.pop(seq, None)
            if reply:
                if self.core.in_sync.required == {self.node.name, self.node.peer}:
                    self.world.checker.acknowledges(seq, self.node.peer, self.world.nodes[self.node.peer].disk)
                reply(True)
        applied = self.published

        def kept() -> None:
            self.disk.applied = max(self.disk.applied, min(applied, max(self.disk.log, default=0)))

        self.world.loop.post(self.node.kernel, self.world.rng.random(), kept)

    # -- link --------------------------------------------------------------------------------------------------

    def _send(self, message: AnyMessage) -> None:
        if self.connection:
            self.connection.send(self.node, message)

    def received(self, message: AnyMessage) -> None:
        self.core.receive(message, self.node.clock())
        self.flush()

    def connected(self, connection: "Connection") -> None:
        self.drop()
        self.connection = connection
        self.core.linked_up(self.node.clock())
        self.flush()

    def drop(self) -> None:
        connection, self.connection = self.connection, None
        if connection:
            connection.close(self.node)
            self.core.unlinked(self.node.clock())
            self.flush()

    def lost(self, connection: "Connection") -> None:
        if self.connection is connection:
            self.connection = None
            self.core.unlinked(self.node.clock())
            self.flush()

    def latest(self) -> Report:
        return self.duty.report(self.disk.cluster_id)
