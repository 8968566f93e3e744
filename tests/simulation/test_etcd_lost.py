"""etcd begins anew or is set back to a backup, at any moment: nobody leads by what it says then, until somebody says
`tandem failover --force` where the command allows it; nothing acknowledged is lost by that."""

import asyncio
import copy
import random
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from ha.etcd import KeyValue
from ha.records import Records, read
from tests.conftest import FUZZ
from tests.simulation.store_world import StoreWorld, small
from tests.simulation.world import TTL_S, Node, Violation, World, drive
from tools.cli.cluster import Cluster, forced, refusal

SEEDS = 40 * FUZZ
PREFIX = "/tandem/sim/"
DECIDES_S = 20  # what a person waits before he forces anything


class EtcdLost(World):
    """The pair is whole when it happens: a backup from before a node was left behind is not what is tried here, since
    without the other node nothing tells that one of it."""

    chose: random.Random
    begun: bool
    wanting = 0
    force = 0

    def prepare(self, seed: int) -> None:
        self.chose = random.Random(seed)  # apart from the world's: the runs of both kinds of world choose alike
        self.begun = False
        self.disorder = 0.0

    def _fault(self) -> None:
        if not self.begun:
            self.begun = True
            self.loop.post(None, 0.0, lambda: asyncio.ensure_future(self._story()))

    async def _story(self) -> None:
        chose = self.chose
        await self._whole()
        backup = (copy.deepcopy(self.etcd._keys), copy.deepcopy(self.etcd._leases), self.etcd._revision)
        for _ in range(chose.randint(0, 3)):
            node = self.nodes[chose.choice("ab")]
            chose.choice((self._kill_gateway, self._kill_agent, self._switch_over, self._power))(node, 3.0)
            await asyncio.sleep(chose.random() * 6)
        await self._whole()
        promised = max(self._promised(node) for node in self.nodes.values())
        if chose.random() < 0.5:
            for node in self.nodes.values():
                node.power_off()
                self.loop.post(None, 1.0 + chose.random() * 8, node.power_on)
        self.etcd.down = True  # a restore takes longer than a lease: nobody holds an address by one any more
        await asyncio.sleep(2 * TTL_S + chose.random() * 5)
        self.etcd.down = False
        self.etcd._keys, self.etcd._leases, revision = backup
        self.etcd._leases = {lease: (self.loop.now + ttl_s, ttl_s) for lease, (_, ttl_s) in self.etcd._leases.items()}
        if chose.random() < 0.4:  # lost altogether
            self.etcd._keys, self.etcd._leases = {}, {}
        if chose.random() < 0.5:
            self.etcd._revision = revision
        state = self._records()[1].state
        knows = state is not None and state.epoch >= promised
        count = 0
        while True:
            await asyncio.sleep(1.0)
            count += 1
            if not knows and not self.force and any(self._leads(node) > promised for node in self.nodes.values()):
                raise Violation("B: a node leads by a state that knows less than the nodes have promised")
            if count % DECIDES_S == 0:
                self._operate()

    def _promised(self, node: Node) -> int:
        mine = node.gateway.latest() if node.gateway else None
        return mine.promised if mine else 0

    def _leads(self, node: Node) -> int:
        mine = node.gateway.latest() if node.gateway and not node.gateway.process.dead else None
        return mine.leading if mine else 0

    def _records(self) -> tuple[dict[str, KeyValue], Records]:
        found = {kv.key.removeprefix(PREFIX): kv for kv in self.etcd.get_prefix(PREFIX)}
        return found, read(found, Records(), self.loop.now)

    async def _whole(self) -> None:
        while not self._settled():
            await asyncio.sleep(0.2)

    def _operate(self) -> None:
        """As `tandem failover --force` does, on one node."""
        found, records = self._records()
        serving = any(node.vip_until > self.loop.now for node in self.nodes.values())
        self.wanting += not serving
        node = self.nodes[self.chose.choice("ab")]
        mine = node.gateway.latest() if node.gateway and not node.gateway.process.dead else None
        if serving or mine is None:
            return
        shown = cast(Cluster, SimpleNamespace(leader=records.leader.node if records.leader else ""))
        if refusal(shown, mine, node.name):
            return
        self.force += 1
        value = msgspec.json.encode(forced(records.state, mine, node.name)).decode()
        revision = self.etcd._revision = self.etcd._revision + 1
        old = found.get("state")
        created = old.create_revision if old else revision
        self.etcd._keys[PREFIX + "state"] = KeyValue(PREFIX + "state", value, created, revision, 0)


class CoreEtcdLost(EtcdLost):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.prepare(seed)
        self.chaos_s, self.settle_s = 60.0, 300.0


class StoreEtcdLost(EtcdLost, StoreWorld):
    def __init__(self, seed: int) -> None:
        StoreWorld.__init__(self, seed)
        self.prepare(seed)
        self.careless, self.wire_bytes_s = False, 0.0
        self.chaos_s, self.settle_s = 60.0, 300.0


class OlderImage(World):
    """Both nodes lose power, one comes back first, with the disk that it had some time ago."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.disorder, self.chaos_s, self.settle_s = 0.0, 60.0, 120.0
        self.begun, self.set_back = False, 0

    def _fault(self) -> None:
        if not self.begun:
            self.begun = True
            self.loop.post(None, 0.0, lambda: asyncio.ensure_future(self._story()))

    async def _story(self) -> None:
        node = self.nodes[self.rng.choice("ab")]
        image = copy.deepcopy(node.disk)
        await asyncio.sleep(10 + self.rng.random() * 20)
        while not self._settled():
            await asyncio.sleep(0.2)
        state = next(kv for kv in self.etcd.get_prefix(PREFIX) if kv.key == f"{PREFIX}state")
        if msgspec.json.decode(state.value)["floor"] <= max(image.log, default=0):
            return
        self.set_back += 1
        for one in self.nodes.values():
            one.power_off()
        image.incarnation = node.disk.incarnation  # as many starts since
        node.disk = image
        node.power_on()
        other = self.nodes[node.peer]
        self.loop.post(None, 15.0 + self.rng.random() * 10, other.power_on)


def run(kind: Any, seed: int) -> Any:
    world = kind(seed)
    drive(world)
    return world


@pytest.mark.timeout(1800)
def test_the_protocol_survives_it() -> None:
    worlds = [run(CoreEtcdLost, seed) for seed in range(SEEDS)]
    assert sum(world.force > 0 for world in worlds) >= SEEDS // 4


@pytest.mark.timeout(1800)
def test_the_store_survives_it() -> None:
    with small():
        worlds = [run(StoreEtcdLost, seed) for seed in range(SEEDS)]
    assert sum(world.force > 0 for world in worlds) >= SEEDS // 4


@pytest.mark.timeout(1800)
def test_an_older_image_never_leads() -> None:
    worlds = [run(OlderImage, seed) for seed in range(SEEDS)]
    assert sum(world.set_back for world in worlds) >= SEEDS // 2
