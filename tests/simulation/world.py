"""Two nodes, a model etcd, a client, and faults from a seed; checks the invariants A-E and G while it runs.

`run(seed)` raises `Violation` with what went wrong. The same seed gives the same run.
"""

import asyncio
import gc
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from ha import decide
from ha.agent import Agent
from ha.etcd import DeleteKey, PutKey
from storage.control import Report, Tell
from storage.replication.messages import AnyMessage
from tests.simulation.gateway import SimGateway
from tests.simulation.model import Disk, Path, SimEtcd, SimEtcdClient
from tests.simulation.virtual import Process, VirtualLoop

TTL_S = 3.0
CHAOS_S = 30.0
SETTLE_S = 90.0
FLOOR_S = 4.0
SETTLE_MAX = 6  # times the patience, however near it comes

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class Violation(Exception):
    """An invariant didn't hold."""


@dataclass
class Checker:
    """What has been seen from outside, by everybody."""

    world: "World"
    log: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    writers: dict[int, str] = field(default_factory=dict)
    acknowledged: list[bytes] = field(default_factory=list)
    deleted: set[bytes] = field(default_factory=set)

    def published(self, node: str, seq: int, epoch: int, payload: bytes) -> None:
        before = self.log.setdefault(seq, (epoch, payload))
        if before != (epoch, payload):
            raise Violation(f"C: entry {seq} was {before}, node {node} publishes {(epoch, payload)}")
        writer = payload.split(b":")[0].decode()
        if self.writers.setdefault(epoch, writer) != writer:
            raise Violation(f"B: epoch {epoch} written by {self.writers[epoch]} and {writer}")

    def acknowledges(self, seq: int, other: str, disk: Disk) -> None:
        """The primary says Success; `other` is in sync too."""
        if seq not in disk.log or seq in disk.owed:
            raise Violation(f"A: entry {seq} is acknowledged, and node {other} lacks it or its bytes")


class Connection:
    """A TCP connection: in order, until a cable or an end fails."""

    def __init__(self, world: "World", a: "Node", b: "Node") -> None:
        self.world = world
        self._ends = {a.name: (b, b.gateway), b.name: (a, a.gateway)}
        self._arrives = {a.name: 0.0, b.name: 0.0}
        self._broken: set[str] = set()

    def send(self, sender: "Node", message: AnyMessage) -> None:
        receiver, gateway = self._ends[sender.name]
        rng, loop = self.world.rng, self.world.loop
        if not self.world.paths[sender.name, receiver.name].up:
            self._broken.add(sender.name)  # what follows can't overtake what is stuck
        if sender.name in self._broken or gateway is None:
            return
        delay = 0.0003 if rng.random() < 0.98 else rng.random()
        arrives = max(self._arrives[sender.name] + 1e-6, loop.now + delay)  # never a tie: the loop may swap those
        if rng.random() < self.world.disorder:
            arrives = loop.now + rng.random() * 0.2  # late or out of turn: the core must not rely on order for safety
            if rng.random() < 0.3:
                loop.post(gateway.process, arrives - loop.now, self._deliver, gateway, message)
            if rng.random() < 0.3:
                return
        else:
            self._arrives[sender.name] = arrives
        loop.post(gateway.process, arrives - loop.now, self._deliver, gateway, message)

    def _deliver(self, gateway: SimGateway, message: AnyMessage) -> None:
        if gateway.connection is self:
            gateway.received(message)

    def close(self, closer: "Node") -> None:
        receiver, gateway = self._ends[closer.name]
        if gateway and self.world.paths[closer.name, receiver.name].up:
            self.world.loop.post(gateway.process, 0.0005, gateway.lost, self)


class SimSite:
    """The virtual address, as the kernel's fence keeps it: it answers until the time runs out, whoever sleeps."""

    def __init__(self, world: "World", node: "Node") -> None:
        self.world, self.node = world, node
        self.reads_wanted, self.reads_able, self.share = True, True, True
        self.vips: tuple[str, ...] = ()
        self.parts: dict[str, float] = {}
        self.alarms: tuple[str, ...] = ()
        self.following, self.follow_stop_s = False, 0.0
        self.followed: dict[str, str] = {}
        self._trouble_until = 0.0

    @property
    def up(self) -> bool:
        return self.node.vip_until > self.world.loop.now

    async def serve(self, seconds: float) -> None:
        other = self.world.nodes[self.node.peer]
        if other.vip_until > self.world.loop.now:
            raise Violation(f"E: {self.node.name} takes the address that {other.name} still answers for")
        self.node.vip_until = self.world.loop.now + seconds
        if self.world.rng.random() < 0.0005:
            self._trouble_until = self.world.loop.now + 20

    def look_ahead(self) -> None:
        pass

    def drain(self, wanted: bool) -> None:
        pass

    @property
    def dark(self) -> bool:
        return not self.up

    @property
    def reads_dark(self) -> bool:
        return self.node.reads_until <= self.world.loop.now

    @property
    def trouble(self) -> str:
        return "smbd doesn't stay up" if self._trouble_until > self.world.loop.now else ""

    async def serve_reads(self, seconds: float) -> None:
        other = self.world.nodes[self.node.peer]
        if other.reads_until > self.world.loop.now:
            raise Violation(f"E: {self.node.name} takes the reading address that {other.name} still answers for")
        self.node.reads_until = self.world.loop.now + seconds

    async def leave_reads(self) -> None:
        self.node.reads_until = 0.0

    async def leave(self) -> None:
        if self.up and self.world.rng.random() < 0.2:  # smbd takes its time
            await asyncio.sleep(self.world.rng.random() * 2)
        self.node.vip_until = 0.0


class Link:
    """The agent's end of the control socket."""

    def __init__(self, node: "Node") -> None:
        self.node = node
        self.report: Report | None = None
        self.dead = False
        self.told_at = 0.0

    async def tell(self, tell: Tell) -> None:
        gateway = self.node.gateway
        if gateway:
            world = self.node.world
            now = world.loop.now
            # In order, as on a socket, but not always at once: the other process may be slow to read.
            self.told_at = max(self.told_at, now + (0.001 if world.rng.random() < 0.98 else world.rng.random()))
            world.loop.post(gateway.process, self.told_at - now, gateway.tell, tell)


class Node:
    def __init__(self, world: "World", name: str, peer: str) -> None:
        self.world, self.name, self.peer = world, name, peer
        self.disk = Disk(store_id=f"store-{name}")
        self.offset = world.rng.random() * 1000
        self.kernel = Process(f"kernel-{name}")
        self.etcd_path = Path()
        self.vip_until = 0.0
        self.reads_until = 0.0
        self.gateway: SimGateway | None = None
        self.agent: Process | None = None
        self.link: Link | None = None
        self.powered = True

    def clock(self) -> float:
        return self.world.loop.now + self.offset

    def start_gateway(self) -> None:
        if self.powered and (self.gateway is None or self.gateway.process.dead):
            self.gateway = self.world.gateway_class(self.world, self)
            self.gateway.start()

    def start_agent(self) -> None:
        if not self.powered or (self.agent and not self.agent.dead):
            return
        self.agent = Process(f"agent-{self.name}")
        self.link = Link(self)
        etcd = SimEtcdClient(self.world.loop, self.world.rng, self.world.etcd, self.agent, self.etcd_path)
        agent = Agent(
            node=self.name,
            peer=self.peer,
            cluster="sim",
            ttl_s=TTL_S,
            gateway_grace_s=5.0,
            etcd=etcd,
            gateway=self.link,
            site=SimSite(self.world, self),
            clock=self.clock,
            new_id=self.world.new_id,
        )
        self.world.loop.spawn(self.agent, agent.run())

    def report(self, report: Report) -> None:
        if self.agent and self.link:
            link = self.link
            self.world.loop.post(self.agent, 0.001, setattr, link, "report", report)
            self.world.loop.post(self.agent, 0.001, setattr, link, "dead", False)

    def kill_gateway(self) -> None:
        if self.gateway and not self.gateway.process.dead:
            self.gateway.process.dead = True
            if self.gateway.connection:
                self.gateway.connection.close(self)
            if self.agent and self.link:
                self.world.loop.post(self.agent, 0.002, setattr, self.link, "report", None)
                self.world.loop.post(self.agent, 0.002, setattr, self.link, "dead", True)

    def kill_agent(self) -> None:
        if self.agent:
            self.agent.dead = True

    def power_off(self) -> None:
        self.powered = False
        for end in (self.name, self.peer):
            self.world.paths[end, self.peer if end == self.name else self.name].up = False
        self.kill_gateway()
        self.kill_agent()
        self.kernel.dead = True
        self.vip_until = 0.0
        self.reads_until = 0.0

    def power_on(self) -> None:
        if self.powered:
            return
        self.powered = True
        self.kernel = Process(f"kernel-{self.name}")
        self.world.heal_cables()
        self.start_gateway()
        self.start_agent()

    def processes(self) -> list[Process]:
        return [process for process in (self.gateway and self.gateway.process, self.agent) if process]


class World:
    node_class: "type[Node]"

    def __init__(self, seed: int, gateway_class: type[SimGateway] = SimGateway) -> None:
        self.seed, self.gateway_class = seed, gateway_class
        self.rng = random.Random(seed)
        self.loop = VirtualLoop()
        self.etcd = SimEtcd(self.loop, self.rng)
        self.checker = Checker(self)
        self.paths = {("a", "b"): Path(), ("b", "a"): Path()}
        self.disorder = self.rng.choice((0.0, 0.0, 0.01, 0.1))
        self.wire_bytes_s = 0.0  # of each connection between the nodes; 0: without limit
        self.nodes = {"a": self.node_class(self, "a", "b"), "b": self.node_class(self, "b", "a")}
        self.chaos_s, self.settle_s = CHAOS_S, SETTLE_S
        self._ids = 0
        self._sent = 0
        self.calm = False

    def new_id(self) -> str:
        self._ids += 1
        return f"id-{self._ids}"

    def heal_cables(self) -> None:
        if all(node.powered for node in self.nodes.values()):
            for path in self.paths.values():
                path.up = True

    # -- life --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        for node in self.nodes.values():
            node.start_gateway()
            node.start_agent()
        background = [asyncio.create_task(self._supervise()), asyncio.create_task(self._clients())]
        await asyncio.sleep(6.0)
        end = self.loop.now + self.chaos_s
        while self.loop.now < end:
            self._fault()
            await asyncio.sleep(self.rng.random() * 6)
        self._heal()
        await self._until_settled("D: the pair didn't come together again")
        await self._scrub_all()
        self.calm = True
        await asyncio.sleep(6.0)
        await self._until_settled("D: not at rest though nobody asks for anything")
        await self._clients_end()
        await asyncio.sleep(8.0)
        await self._until_settled("D: not at rest at the end")  # what both nodes have for long may just be forgotten
        self._final()
        for task in background:
            task.cancel()

    async def _until_settled(self, otherwise: str) -> None:
        """`settle_s` after it came nearer to that last: beside clients that never rest much takes long, though not for
        ever."""
        deadline, left = self.loop.now + self.settle_s, self._left()
        end = self.loop.now + SETTLE_MAX * self.settle_s
        while not self._settled():
            if (now := self._left()) < left:
                deadline = self.loop.now + self.settle_s
            left = now
            if self.loop.now > min(deadline, end):
                raise Violation(f"{otherwise}: {self._where()}")
            await asyncio.sleep(0.5)

    async def _supervise(self) -> None:
        """systemd and TCP connect."""
        while True:
            await asyncio.sleep(0.3)
            for node in self.nodes.values():
                if self.rng.random() < 0.3:
                    node.start_gateway()
                    node.start_agent()
            self._connect()

    def _connect(self) -> None:
        a, b = self.nodes["a"], self.nodes["b"]
        if not all(path.up for path in self.paths.values()) or not a.gateway or not b.gateway:
            return
        ends = (a.gateway, b.gateway)
        if any(end.process.dead for end in ends) or ends[0].process.stopped or ends[0].connection:
            return  # a connection to a stopped process is made by its kernel
        connection = Connection(self, a, b)
        for end in ends:
            self.loop.post(end.process, 0.0005, end.connected, connection)

    async def _clients(self) -> None:
        while True:
            await asyncio.sleep(0.02 + self.rng.random() * 0.1)
            if self.calm:
                continue
            reading = self.rng.random() < 0.3
            node = next((node for node in self.nodes.values() if node.vip_until > self.loop.now), None)
            if reading and self.rng.random() < 0.3:
                node = self.nodes[self.rng.choice("ab")]  # on its own address, which no fence guards
            if node is None or node.gateway is None:
                continue
            gateway = node.gateway
            if reading:
                expected = len(self.checker.acknowledged)
                self.loop.post(gateway.process, self._lag(), self._read, gateway, expected)
                continue
            self._sent += 1
            self.loop.post(gateway.process, self._lag(), self._put, gateway, self._sent)

    def _lag(self) -> float:
        return 0.001 if self.rng.random() < 0.95 else self.rng.random() * 4

    def _put(self, gateway: SimGateway, number: int) -> None:
        kind = "del" if number % 7 == 0 else "put"
        payload = f"{gateway.node.name}.{gateway.core.incarnation}:{kind}:{number}".encode()

        def reply(ok: bool) -> None:
            if ok:
                self.checker.acknowledged.append(payload)

        gateway.put(payload, reply)

    def _read(self, gateway: SimGateway, expected: int) -> None:
        found = gateway.read()
        if found is None:
            return
        missing = [payload for payload in self.checker.acknowledged[:expected] if payload not in found]
        if missing:
            raise Violation(f"C: node {gateway.node.name} answers a read without {missing[0]!r}")

    # -- faults ------------------------------------------------------------------------------------------------

    def _switch_over(self, node: Node, for_s: float) -> None:
        """Somebody asks for it; the wish ends by itself."""
        self.etcd.txn((), (PutKey("/tandem/sim/switchover", node.name),))
        self.loop.post(None, 5.0 + for_s, self.etcd.txn, (), (DeleteKey("/tandem/sim/switchover"),))

    def _pause(self, _node: Node, for_s: float) -> None:
        self.etcd.txn((), (PutKey("/tandem/sim/pause", ""),))
        self.loop.post(None, for_s, self.etcd.txn, (), (DeleteKey("/tandem/sim/pause"),))

    def _fault(self) -> None:
        node = self.nodes[self.rng.choice("ab")]
        for_s = self.rng.choice((0.5, 2.0, 5.0, 12.0)) * self.rng.random()
        faults: list[Callable[[Node, float], None]] = [
            self._kill_gateway,
            self._kill_agent,
            self._power,
            self._stop_process,
            self._stop_node,
            self._cut_link,
            self._cut_one_way,
            self._cut_etcd,
            self._etcd_down,
            self._cut_all,
            self._lossy_etcd,
            self._switch_over,
            self._pause,
        ]
        self.rng.choice(faults)(node, for_s)

    def _kill_gateway(self, node: Node, _for_s: float) -> None:
        node.kill_gateway()

    def _kill_agent(self, node: Node, _for_s: float) -> None:
        node.kill_agent()

    def _power(self, node: Node, for_s: float) -> None:
        node.power_off()
        self.loop.post(None, for_s, node.power_on)
        if self.rng.random() < 0.3:
            other = self.nodes[node.peer]
            other.power_off()
            self.loop.post(None, for_s * self.rng.random() * 2, other.power_on)

    def _stop(self, processes: list[Process], for_s: float) -> None:
        for process in processes:
            process.stopped = True
            self.loop.post(None, for_s, self.loop.resume, process)

    def _stop_process(self, node: Node, for_s: float) -> None:
        self._stop([self.rng.choice(node.processes())], for_s)

    def _stop_node(self, node: Node, for_s: float) -> None:
        self._stop(node.processes(), for_s)

    def _cut_link(self, _node: Node, for_s: float) -> None:
        for path in self.paths.values():
            path.up = False
        self.loop.post(None, for_s, self.heal_cables)

    def _cut_one_way(self, node: Node, for_s: float) -> None:
        self.paths[node.name, node.peer].up = False
        self.loop.post(None, for_s, self.heal_cables)

    def _cut_etcd(self, node: Node, for_s: float) -> None:
        node.etcd_path.up = False
        self.loop.post(None, for_s, setattr, node.etcd_path, "up", True)

    def _lossy_etcd(self, node: Node, for_s: float) -> None:
        node.etcd_path.loss = 0.3
        self.loop.post(None, for_s, setattr, node.etcd_path, "loss", 0.0)

    def _etcd_down(self, _node: Node, for_s: float) -> None:
        self.etcd.down = True
        self.loop.post(None, for_s, setattr, self.etcd, "down", False)

    def _cut_all(self, node: Node, for_s: float) -> None:
        self._cut_link(node, for_s)
        self._cut_etcd(node, for_s)

    def _heal(self) -> None:
        self.disorder = 0.0
        self.etcd.down = False
        for node in self.nodes.values():
            node.power_on()
            node.etcd_path.up, node.etcd_path.loss = True, 0.0
            for process in node.processes():
                if process.stopped:
                    self.loop.resume(process)
        self.heal_cables()

    async def _clients_end(self) -> None:
        """What clients have left open is closed."""

    async def _scrub_all(self) -> None:
        """Nothing to scrub in memory."""

    # -- end ---------------------------------------------------------------------------------------------------

    def _left(self) -> int:
        """What is still to be done until it has settled."""
        return 0

    def _settled(self) -> bool:
        cores = [node.gateway.core for node in self.nodes.values() if node.gateway and not node.gateway.process.dead]
        leaders = [core for core in cores if core.leading]
        if len(cores) != 2 or len(leaders) != 1:
            return False
        leader = leaders[0]
        if leader.commit < leader.accepted:
            return False  # something was lost on the way; the leader notices within `ack_timeout_s`
        return (
            leader.in_sync.confirmed == leader.in_sync.required == {"a", "b"}
            and leader.in_sync.ask is None
            and leader.live
        )

    def _where(self) -> str:
        return "; ".join(
            f"{node.name}: {node.gateway.latest() if node.gateway else 'no gateway'}" for node in self.nodes.values()
        )

    def _final(self) -> None:
        logs = [node.disk.log for node in self.nodes.values()]
        if logs[0] != logs[1]:
            raise Violation("D: the logs differ")
        held = [payload for _, payload in logs[0].values()]
        lost = set(self.checker.acknowledged) - set(held)
        if lost:
            raise Violation(f"A: acknowledged and lost: {sorted(lost)[:3]}")
        deleted = [payload for payload in self.checker.acknowledged if b":del:" in payload]
        if any(payload not in held for payload in deleted):
            raise Violation("G: a deletion was forgotten")
        for node in self.nodes.values():
            if node.gateway and node.gateway.published != len(logs[0]):
                raise Violation(f"D: node {node.name} shows {node.gateway.published} of {len(logs[0])} entries")


World.node_class = Node


def drive(world: World) -> None:
    """Run a world to its end; raises Violation."""
    loop = world.loop
    asyncio.set_event_loop(loop)
    gc.collect()
    gc.disable()  # a coroutine of a process that died would end, and do things, whenever it is collected
    floor_s, decide.FLOOR_S = decide.FLOOR_S, FLOOR_S
    try:
        main = loop.create_task(world.run())
        while not main.done():
            loop.call_later(0.5, loop.stop)
            loop.run_forever()
            for failure in loop.failures:
                while isinstance(failure, BaseExceptionGroup):
                    failure = failure.exceptions[0]
                raise Violation(f"{type(failure).__name__}: {failure}") from failure
        main.result()
    finally:
        gc.enable()
        decide.FLOOR_S = floor_s
        asyncio.set_event_loop(None)
        loop.close()


def run(seed: int, gateway_class: type[SimGateway] = SimGateway) -> dict[str, Any]:
    """Run one seed; returns counts, raises Violation."""
    world = World(seed, gateway_class)
    drive(world)
    return {"entries": len(world.checker.log), "acknowledged": len(world.checker.acknowledged)}
