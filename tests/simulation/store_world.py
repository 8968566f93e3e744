"""The real store of both nodes, with the real agent, on simulated disks, wire, threads and etcd.

Beyond the faults of `world.py`: power that goes at any disk operation, disks that lose what wasn't synced, disks that
fail for good or fill up, flipped bits, deletions and replacements, also while a node is away. `run(seed)` raises
`Violation` with what went wrong. The same seed gives the same run.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import xxhash

from conf.settings import Settings, build
from gateway.dicom.part10 import file_header
from storage import checkpoints, crash, environment
from storage.control import Report, Tell
from storage.engine import Engine
from storage.environment import Surroundings, open_log
from storage.files import catching_up, copies, keeper, mirror, mirroring, own_copies
from storage.ingest import Conflict, NotServing
from storage.log.log import Log
from storage.objects import blocks, incoming, reading
from storage.objects.blob_store import digest_of
from storage.objects.describing import description_of
from storage.objects.reading import Unavailable
from storage.objects.volume import NoRoom, VolumeOffline
from storage.replication import giving, peering
from storage.state import file_rows, transfer
from storage.state.catalogue import Catalogue
from storage.state.description import SIZE
from storage.state.entries import epochs_of
from storage.state.logged import logged
from storage.state.model import Delete, Forget, Instance, Put, Task, TaskDone, Void
from storage.upkeep import forgetting, healing, scrub, share_copies, tidying
from tests.simulation.copies import MemoryCopies
from tests.simulation.files import FileProgram, KnownFiles
from tests.simulation.machine import Machine, MemoryDisk, PowerCut, VirtualThreads
from tests.simulation.share import Known, Rows, ShareProgram, images_of, rows_of
from tests.simulation.virtual import Process
from tests.simulation.wire import Wire
from tests.simulation.world import Node, Violation, World, drive

HEADER = file_header("1.2", "1.2.3", "1.2.1", "SENDER")
OLD_HEADER = HEADER[: -SIZE - 12]  # as older versions wrote it, without room for what it is
OLD_SHARE: Final = 0.25
READ_WHOLE: Final = 0.5
STUDY, SERIES, AE = "1.2.3", "1.2.3.4", "SENDER"
LOG_BYTES = 16 * (16 << 10)
CHAOS_S = 14.0
SETTLE_S = 240.0


def settings(name: str, peer: str, volumes: list[Path], state_after: int) -> Settings:
    return build(
        {
            "node": {"name": name},
            "storage": {
                "volumes": [str(path) for path in volumes],
                "reserve_bytes": 0,
                "reprotect_after_s": 5.0,
                "hang_s": 2.0,
                "scrub_days": 3e-5,
            },
            "cluster": {
                "name": "sim",
                "address": "10.0.0.1",
                "peer": peer,
                "peer_address": "10.0.0.2",
                "etcd": ["http://etcd"],
                "state_after": state_after,
            },
        },
        "simulation",
    )


class StoreGateway:
    """A gateway process with the real store in it."""

    def __init__(self, world: "StoreWorld", node: "StoreNode") -> None:
        self.world, self.node = world, node
        self.process = Process(f"gateway-{node.name}")
        self.wire = Wire(world, node.name, node.peer, self.process)
        self.connection = None
        self.store: Engine | None = None
        self.program: FileProgram | None = None
        self.tasks: set[asyncio.Task[Any]] = set()

    def start(self) -> None:
        self.world.loop.spawn(self.process, self._run())

    async def _run(self) -> None:
        world, machine = self.world, self.node.machine
        await asyncio.sleep(0.3)

        def threads(count: int, _name: str) -> VirtualThreads:
            return VirtualThreads(world.loop, world.rng, self.process, count)

        around = Surroundings(
            networks=(self.wire,),
            view=lambda archives: NoView(),
            open_catalogue=lambda: Catalogue(machine.kv),
            open_log=self._open_log,
            clock=self.node.clock,
            workers=threads,
            open_volume=machine.open_volume,
            open_copies=lambda paths, _reserve, _draining, *, complete: MemoryCopies(machine, paths, complete=complete),
        )
        missed = set(Catalogue(machine.kv).missing())
        try:
            store = Engine(settings(self.node.name, self.node.peer, list(machine.disks), world.state_after), around)
            if world.files is None:
                store.share_copies.look = _nothing  # type: ignore[method-assign]  # names alone: no file has bytes
            self._check_after_power(store, missed)
            await store.start()
        except PowerCut:
            return
        store.on_change = lambda: self.node.report(store.report())
        self.store = store
        self._share(store, threads(4, "share"))
        try:
            await store.fatal
        except OSError:
            self.process.dead = True  # started again by the supervisor
        except Exception as error:
            raise Violation(f"node {self.node.name} gives up: {type(error).__name__}: {error}") from error

    def _share(self, store: Engine, threads: VirtualThreads) -> None:
        """Of half the seeds one program works on names alone, of the others one on whole files."""
        world, node = self.world, self.node.name
        if world.files is None:
            self.spawn(ShareProgram(world, world.known, store, node, self.spawn).run())
            return
        self.program = FileProgram(world, world.files, store, node, threads, self.spawn)
        self.spawn(self.program.run())

    def _open_log(self, catalogue: Catalogue) -> Log:
        kept = open_log(self.node.machine.log, catalogue, LOG_BYTES)
        self.logged_upto = kept.last[1]
        return kept

    def _check_after_power(self, store: Engine, missed: set[int]) -> None:
        """A power cut takes nothing that was in the log before it: neither what recovery looks at nor what is older.
        `missed`: copies that were missing before."""
        node = self.node
        if self.world.careless or not node.lost_power:
            return
        node.lost_power = False
        disks = {disk.volume_id: disk for disk in node.machine.disks.values() if not (disk.broken or disk.hung)}
        rows = list(store.catalogue.locations())
        rows += [
            (seq, was)
            for seq in store.catalogue.missing()
            if seq not in missed and (was := store.catalogue.was_at(seq))
        ]
        for seq, location in rows:
            disk, put = disks.get(location.volume), store.catalogue.entry(seq).operation
            name = f"archive/{location.path}"
            if disk is None or not isinstance(put, Put) or (location.volume, name) in node.harmed:
                continue
            if seq > self.logged_upto:
                continue  # it was being cut off: no leader has it
            if (
                store.catalogue.is_missing(seq)
                and seq >= store.log.first
                and logged(store.log.read(seq)).data is not None
            ):
                continue  # no disk took it when the node came back; the log still has it
            file = disk.names.get(name) or disk.names.get(f"spool/{location.spool}")
            if file is None or xxhash.xxh3_128_digest(file.data[put.offset :]) != put.digest:
                raise Violation(f"A: a power cut took entry {seq} ({put.sop_instance}) from node {node.name}")

    # -- agent -------------------------------------------------------------------------------------------------

    def tell(self, tell: Tell) -> None:
        if self.store:
            new = tell.role == "lead" and self.store.duty.serving is False
            self.store.tell(tell)
            self.node.report(self.store.report())
            if new:
                self.spawn(self._read_eagerly())

    async def _read_eagerly(self) -> None:
        """Clients that have waited for a primary ask at once."""
        for _ in range(100):
            await asyncio.sleep(0.002)
            for uid in list(self.world.objects)[-3:]:
                self.world.read_now(self, uid)

    def latest(self) -> Report | None:
        return self.store.report() if self.store else None

    # -- clients -----------------------------------------------------------------------------------------------

    def spawn(self, coroutine: Any) -> "asyncio.Task[Any]":
        task = self.world.loop.spawn(self.process, coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def put(self, uid: str, payload: bytes, done: Callable[[str], None]) -> None:
        store = self.store
        if store is None:
            return
        digest = xxhash.xxh3_128_digest(payload)

        def make(found: bytes, length: int) -> Put:
            if found != digest:
                raise Violation("the digest isn't that of the bytes")
            keys = {"PatientID": "P"}
            return Put(uid, "1.2", STUDY, SERIES, "1.2.1", found, length, len(header), keys, AE, 0.0)

        header = OLD_HEADER if self.world.rng.random() < OLD_SHARE else HEADER
        try:
            upload = store.begin(header)
        except (NotServing, NoRoom):
            return
        try:
            upload.incoming.feed(memoryview(payload))
            await upload.room()
            await store.put(upload, make)
        except (NotServing, Conflict, OSError, NoRoom) as error:
            done(type(error).__name__)
            return
        done("")

    async def delete(self, uid: str, done: Callable[[str], None]) -> None:
        if self.store is None:
            return
        try:
            await self.store.delete(Delete(STUDY, SERIES, uid, "by request", "sim", 0.0))
        except NotServing:
            return
        done("")

    async def change_task(self, change: Task | TaskDone, done: Callable[[], None]) -> None:
        if self.store is None:
            return
        try:
            await self.store.commit(change)
        except NotServing:
            return
        done()

    async def read(self, uid: str, check: Callable[[bytes | None], None]) -> None:
        store = self.store
        if store is None or not store.may_serve:
            return
        await store.settled()
        instance = store.catalogue.instance(uid)
        if not store.may_serve:
            return
        check(instance.put.digest if instance else None)
        if instance and self.world.rng.random() < READ_WHOLE:
            await self._read_bytes(store, instance)

    async def _read_bytes(self, store: Engine, instance: Instance) -> None:
        """What is given out is what was stored, or nothing."""
        digest = xxhash.xxh3_128()
        try:
            async for block in (await store.reading.open(instance)).blocks():
                digest.update(block)
        except (Unavailable, OSError):
            return
        if digest.digest() != instance.put.digest:
            raise Violation(f"D: bytes of {instance.put.sop_instance} were given out that nobody stored")


async def _nothing() -> None:
    pass


class NoView:
    def show(self, study: str, target: Path) -> None:
        pass


class StoreNode(Node):
    def __init__(self, world: "World", name: str, peer: str) -> None:
        super().__init__(world, name, peer)
        self.machine = Machine(name, world.rng, clock=lambda: world.loop.now)
        self.machine.power.on_cut = self.power_gone
        self.lost_power = False  # since its gateway was started last
        self.harmed: set[tuple[str, str]] = set()  # (volume, file) that somebody has damaged or deleted

    def power_gone(self) -> None:
        """In the middle of a disk operation."""
        self.world.loop.post(None, 0.5 + self.world.rng.random() * 4, self.power_on)
        self.power_off()

    def kill_gateway(self) -> None:
        alive = self.gateway and not self.gateway.process.dead
        super().kill_gateway()
        if alive and self.gateway:
            self.gateway.wire.died()  # type: ignore[attr-defined]

    def power_off(self) -> None:
        super().power_off()
        self.lost_power = True
        self.machine.cut_power()


@dataclass
class Object:
    """What the clients know of one SOP Instance UID."""

    versions: list[bytes] = field(default_factory=list)  # digests that may be what is stored, newest last
    acknowledged: bytes | None = None
    deleting: bool = False  # a deletion was asked for
    deleted: bool = False  # and answered
    busy: bool = False  # a request about it is on its way: the next one waits, or the order would be anybody's guess


class StoreWorld(World):
    node_class = StoreNode

    def __init__(self, seed: int) -> None:
        super().__init__(seed, StoreGateway)  # type: ignore[arg-type]
        self.state_after = (0, 8, 1_000_000)[seed % 3]
        self.objects: dict[str, Object] = {}
        self.tasks: dict[str, str] = {}  # ID -> "promised" (answered), "ending" (asked for), "over" (answered)
        self.chaos_s, self.settle_s = CHAOS_S, SETTLE_S
        self.known = Known()
        self.files = KnownFiles() if seed % 2 else None
        self._number = 0
        # Now and then both copies of an object may be destroyed: then it may be unavailable, but never wrong.
        self.careless = self.rng.random() < 0.15
        # Objects that take seconds: heartbeats and acknowledgements must not wait for them.
        self.wire_bytes_s = self.rng.choice((0.0, 0.0, 0.0, 0.0, 200_000.0, 40_000.0))

    @property
    def disks(self) -> dict[str, list[MemoryDisk]]:
        """Of each node."""
        return {
            name: list(node.machine.disks.values()) for name, node in self.nodes.items() if isinstance(node, StoreNode)
        }

    def _connect(self) -> None:
        """The stores dial by themselves."""

    # -- clients -----------------------------------------------------------------------------------------------

    async def _clients(self) -> None:
        while True:
            await asyncio.sleep(0.03 + self.rng.random() * 0.2)
            node = next((node for node in self.nodes.values() if node.vip_until > self.loop.now), None)
            if self.calm or node is None or not isinstance(node.gateway, StoreGateway):
                continue
            choice = self.rng.random()
            known = [uid for uid, one in self.objects.items() if one.acknowledged and not (one.deleting or one.busy)]
            if choice < 0.03:
                self._change_task(node.gateway)
            elif choice < 0.12 and known:
                self._delete(node.gateway, self.rng.choice(known))
            elif choice < 0.2 and known:
                self._put(node.gateway, self.rng.choice(known))
            elif choice < 0.4 and self.objects:
                self._read(node.gateway, self.rng.choice(list(self.objects)))
            else:
                self._number += 1
                self._put(node.gateway, f"1.2.3.4.{self._number}")

    def _size(self) -> int:
        return self.rng.choice((10, 200, 200, 900, 3000, 9000))

    def _put(self, gateway: StoreGateway, uid: str) -> None:  # type: ignore[override]
        size = self._size()
        self._ids += 1
        payload = f"{uid}/{self._ids}/".encode() * (size // 8)
        digest = xxhash.xxh3_128_digest(payload)
        one = self.objects.setdefault(uid, Object())
        one.versions.append(digest)
        one.busy = True

        def done(error: str) -> None:
            one.busy = False
            if not error:
                one.acknowledged = digest
                if one.versions[-1] == digest:
                    one.versions = [digest]

        gateway.spawn(gateway.put(uid, payload, done))

    def _change_task(self, gateway: StoreGateway) -> None:
        """Promise something, or end what was promised."""
        promised = [task for task, state in self.tasks.items() if state == "promised"]
        change: Task | TaskDone
        if promised and self.rng.random() < 0.5:
            name, state = self.rng.choice(promised), "over"
            self.tasks[name], change = "ending", TaskDone(name, "done")
        else:
            self._number += 1
            name, state = f"task {self._number}", "promised"
            change = Task(name, "kind", AE, b"", float(self._number))
        gateway.spawn(gateway.change_task(change, lambda: self.tasks.update({name: state})))

    def _delete(self, gateway: StoreGateway, uid: str) -> None:
        one = self.objects[uid]
        one.deleting = True

        def done(_: str) -> None:
            one.deleted = True

        gateway.spawn(gateway.delete(uid, done))

    def read_now(self, gateway: StoreGateway, uid: str) -> None:
        if gateway.store and gateway.store.may_serve:
            self._read(gateway, uid)

    def _read(self, gateway: StoreGateway, uid: str) -> None:  # type: ignore[override]
        one = self.objects[uid]
        expected, deleted = one.acknowledged, one.deleted

        def check(found: bytes | None) -> None:
            if deleted and found is not None:
                raise Violation(f"G: {uid} was deleted and is read")
            if expected and not one.deleting and found is None:
                raise Violation(f"C: {uid} was acknowledged and isn't found")

        gateway.spawn(gateway.read(uid, check))

    # -- faults ------------------------------------------------------------------------------------------------

    def _fault(self) -> None:
        node = self.nodes[self.rng.choice("ab")]
        assert isinstance(node, StoreNode)
        for_s = self.rng.choice((0.5, 2.0, 5.0)) * self.rng.random()
        faults: list[Callable[[Any, float], None]] = [
            self._kill_gateway,
            self._power,
            self._power_in_the_middle,
            self._power_in_the_middle,
            self._stop_process,
            self._cut_link,
            self._cut_all,
            self._fill,
            self._hang_disk,
            self._break_disk,
            self._flip_bit,
            self._delete_by_hand,
            self._add_by_hand,
            self._switch_over,
        ]
        if self.careless:
            faults += [self._break_disk, self._flip_bit] * 3
        self.rng.choice(faults)(node, for_s)

    def _power_in_the_middle(self, node: StoreNode, _for_s: float) -> None:
        if node.powered:
            node.machine.power.operations_left = self.rng.randrange(1, 40)

    def _fill(self, node: StoreNode, for_s: float) -> None:
        for disk in self.rng.sample(list(node.machine.disks.values()), self.rng.choice((1, 2))):
            disk.full = True
            self.loop.post(None, for_s, setattr, disk, "full", False)

    def _hang_disk(self, node: StoreNode, for_s: float) -> None:
        """A disk doesn't answer for a while: briefly, or for longer than it is waited for."""
        disk = self.rng.choice(list(node.machine.disks.values()))
        disk.hung = True
        self.loop.post(None, for_s * self.rng.choice((0.1, 1.0, 3.0)), disk.answers)

    def protected(self) -> bool:
        """Each node holds a good copy of everything: then one copy may be destroyed, never two."""
        if any(not node.powered for node in self.nodes.values()):
            return False
        if self.careless:
            return True
        if any(disk.broken for node in self.nodes.values() for disk in node.machine.disks.values()):
            return False  # nobody may have noticed yet
        stores = [node.gateway.store for node in self.nodes.values() if isinstance(node.gateway, StoreGateway)]
        if len(stores) != 2 or not self._settled():
            return False
        for store in stores:
            if store is None or store.catalogue.counts()["missing"] or store.volumes.usable != len(store.volumes.slots):
                return False
            core = store.core
            if not core.whole or core.durable != core.accepted or store.journal.behind:
                return False
            with store.catalogue.kv.read() as txn:
                if txn.count("file_lacking") or txn.count("file_dirty"):
                    return False
        return stores[0].core.durable == stores[1].core.durable  # type: ignore[union-attr]

    def _break_disk(self, node: StoreNode, _for_s: float) -> None:
        """A disk fails for good; some time later there is an empty one in its place."""
        if not self.protected():
            return
        path = self.rng.choice(list(node.machine.disks))
        node.machine.disks[path].broken = True
        self.loop.post(None, 1.0 + self.rng.random() * 8, self._replace_disk, node, path)

    def _replace_disk(self, node: StoreNode, path: Path) -> None:
        if not node.machine.disks[path].broken:
            return  # somebody was faster
        node.machine.new_disk(path)
        gateway = node.gateway
        if isinstance(gateway, StoreGateway) and gateway.store and not gateway.process.dead:
            gateway.spawn(self._take_volume(gateway.store, path))

    async def _take_volume(self, store: Engine, path: Path) -> None:
        with contextlib.suppress(VolumeOffline, OSError):  # refused: it broke again just now
            await store.take_volume(path)

    def _archived(self, node: StoreNode, most: bool) -> list[tuple[MemoryDisk, str]]:
        """Files of one disk that may be damaged now: half of them, or one."""
        if not self.protected():
            return []
        disk = self.rng.choice(list(node.machine.disks.values()))
        names = [name for name in sorted(disk.names) if name.startswith("archive/")]
        chosen = self.rng.sample(names, len(names) // 2 if most else min(1, len(names)))
        node.harmed |= {(disk.volume_id, name) for name in chosen}
        return [(disk, name) for name in chosen]

    def _flip_bit(self, node: StoreNode, _for_s: float) -> None:
        for disk, name in self._archived(node, self.careless):
            file = disk.names[name]
            if len(file.data) <= len(HEADER):
                continue  # the power has taken the rest
            at = self.rng.randrange(len(HEADER), len(file.data))
            file.data[at] ^= 1
            file.synced = bytes(file.data)
        self._scrub_soon(node)

    def _delete_by_hand(self, node: StoreNode, _for_s: float) -> None:
        for disk, name in self._archived(node, self.careless):
            disk.remove_by_hand(name)
        self._scrub_soon(node)

    def _add_by_hand(self, node: StoreNode, _for_s: float) -> None:
        """Somebody copies a file into the tree; it is none of ours."""
        if node.powered:
            for disk, name in self._archived(node, most=False):
                disk.add_by_hand(f"{name.rpartition('/')[0]}/9.9.{self.rng.randrange(1 << 30)}.dcm", b"by hand")

    def _scrub_soon(self, node: StoreNode) -> None:
        """Before the other copy may be damaged as well."""
        if isinstance(node.gateway, StoreGateway) and not self.careless:
            self.loop.post(node.gateway.process, 0.01, self._scrub, node.gateway)

    def _scrub(self, gateway: StoreGateway) -> None:
        gateway.spawn(self._examine(gateway))

    async def _examine(self, gateway: StoreGateway) -> None:
        store = gateway.store
        if store:
            for seq, _ in list(store.catalogue.locations()):
                await store.healing.examine(seq)
            await store.scrub.strangers()

    async def _scrub_all(self) -> None:
        """Bits flipped just before a crash are found at the end; then everything must heal."""
        for node in self.nodes.values():
            assert isinstance(node.gateway, StoreGateway)
            await self.loop.spawn(node.gateway.process, self._examine(node.gateway))
        await self._until_settled("D: not healed")

    async def _clients_end(self) -> None:
        while self.files is not None:
            await self._until_settled("D: not at rest after what was left open was closed")
            gateways = [node.gateway for node in self.nodes.values()]
            leader = next(one for one in gateways if isinstance(one, StoreGateway) and one.store.core.leading)  # type: ignore[union-attr]
            with contextlib.suppress(OSError, NotServing):  # another one took over just now
                await self.loop.spawn(leader.process, leader.program.settle(careless=self.careless))  # type: ignore[union-attr]
                return

    def _heal(self) -> None:
        for node in self.nodes.values():
            assert isinstance(node, StoreNode)
            node.machine.power.operations_left = None
            for disk in node.machine.disks.values():
                disk.full = False
                disk.answers()
            for path, disk in list(node.machine.disks.items()):
                if disk.broken:
                    self._replace_disk(node, path)
        super()._heal()
        self.loop.post(None, 3.0, self._take_back)

    def _take_back(self) -> None:
        """Somebody looks at the disks that were given up, finds nothing wrong, and takes them into service again."""
        if self.calm:
            return
        for node in self.nodes.values():
            gateway = node.gateway
            if isinstance(gateway, StoreGateway) and gateway.store and not gateway.process.dead:
                for slot in gateway.store.volumes.slots:
                    if not slot.usable:
                        gateway.spawn(self._take_volume(gateway.store, slot.path))
        self.loop.post(None, 3.0, self._take_back)

    # -- end ---------------------------------------------------------------------------------------------------

    def _left(self) -> int:
        """Copies to be made again, of both nodes, and entries that one of them hasn't got yet."""
        missing, ends = 0, []
        for node in self.nodes.values():
            with node.machine.kv.read() as txn:
                missing += txn.count("missing")
                ends.append(epochs_of(txn).last[1])
        return missing + max(ends) - min(ends)

    def _settled(self) -> bool:
        gateways = [node.gateway for node in self.nodes.values() if node.gateway and not node.gateway.process.dead]
        stores = [gateway.store for gateway in gateways if isinstance(gateway, StoreGateway) and gateway.store]
        leaders = [store.core for store in stores if store.core.leading]
        if len(stores) != 2 or len(leaders) != 1:
            return False
        if any(not slot.usable for store in stores for slot in store.volumes.slots):
            return False  # it comes back, or is taken back
        if self.calm and any(gateway.tasks for gateway in gateways if isinstance(gateway, StoreGateway)):
            return False  # somebody still waits for an answer
        leader = leaders[0]
        if not (
            leader.in_sync.confirmed == leader.in_sync.required == {"a", "b"}
            and leader.in_sync.ask is None
            and leader.live
        ):
            return False
        if leader.commit < leader.accepted:
            return False  # one of the two connections lost something; the leader will notice
        if any(end.stuck for node in self.nodes.values() if node.gateway for end in node.gateway.wire.ends):
            return False  # one direction of one connection is dead; the kernel will end it
        return self.careless or not any(store.catalogue.counts()["missing"] for store in stores)

    def _where(self) -> str:
        said = []
        for node in self.nodes.values():
            store = node.gateway.store if isinstance(node.gateway, StoreGateway) else None
            said.append(f"{node.name}: {store and (store.catalogue.counts(), store.core.last, node.gateway.latest())}")
        return "; ".join(said)

    def _final(self) -> None:
        for node in self.nodes.values():
            assert isinstance(node, StoreNode)
            self._check_node(node)
        first, second = (self._names(node) for node in self.nodes.values())
        if self.files is None:
            self.known.final(first, second)
        else:
            self._check_files(self.files, first, second)
        first, second = (self._images(node) for node in self.nodes.values())
        if first != second:
            raise Violation(f"D: images in {[table for table in first if first[table] != second[table]]} differ")
        if self.careless:
            return  # what is bad is still being set aside, and what is gone asked for
        first, second = (list(_log(node)) for node in self.nodes.values())
        longer, length = max(first, second, key=len), min(len(first), len(second))
        if any(not isinstance(operation, Forget) for _, _, operation in longer[length:]):  # one is under way any time
            raise Violation(f"D: one log ends at {length}, the other one at {len(longer)}")
        for mine, other in zip(first, second, strict=False):
            both_live = not isinstance(mine[2], Void) and not isinstance(other[2], Void)
            if mine[:2] != other[:2] or (both_live and mine != other):
                raise Violation(f"D: the logs differ: {mine} and {other}")

    def _check_files(self, known: KnownFiles, first: Rows, second: Rows) -> None:
        """What was flushed is on both nodes, and the same."""
        if first != second:
            raise Violation(f"D: different rows in {[table for table in first if first[table] != second[table]]}")
        if self.careless:
            return
        for number, content in known.contents.items():
            copies = [self._copy(node, number) for node in self.nodes.values()]
            if copies[0] is None or copies[1] is None:
                if content.answered and not content.removing:
                    raise Violation(f"A: inode {number} isn't there")
                continue
            if copies[0] != copies[1]:
                raise Violation(f"D: the copies of inode {number} differ")
            known.check(number, copies[0], "a and b")

    def _copy(self, node: StoreNode, number: int) -> bytes | None:
        """The bytes of a file there, as the rows and the disks say; None if there is none of that number."""
        with node.machine.kv.read() as txn:
            if file_rows.is_gone(txn, number):
                return None
            if file_rows.is_dirty(txn, number) or file_rows.lacking(txn, number):
                raise Violation(f"D: inode {number} isn't clean, or not on both nodes")
            copies = MemoryCopies(node.machine, list(node.machine.disks))
            copies.space = file_rows.space(txn)
            size = file_rows.inode(txn, number).size
            found = copies.open(number, file_rows.generation(txn, number, node.name), named=True)
        if found is None and size:
            raise Violation(f"D: node {node.name} has no copy of inode {number}")
        data = found.read(1 << 20, 0) if found is not None else b""
        if len(data) != size:
            raise Violation(f"D: inode {number} on node {node.name} is {len(data)} bytes long, and not {size}")
        return data

    def _names(self, node: StoreNode) -> Rows:
        with node.machine.kv.read() as txn:
            return rows_of(txn)

    def _images(self, node: StoreNode) -> Rows:
        with node.machine.kv.read() as txn:
            return images_of(txn)

    def _check_node(self, node: StoreNode) -> None:
        catalogue = Catalogue(node.machine.kv)
        held: dict[str, int] = {}
        for path, disk in node.machine.disks.items():
            for name in disk.names:
                if name.startswith("archive/"):
                    held[f"{disk.volume_id}/{name.removeprefix('archive/')}"] = 1
                elif name.startswith("spool/") and not self.careless:
                    raise Violation(f"D: {name} is left in the spool of {path} on node {node.name}")
        there = {task.id for task in catalogue.tasks()}
        for name, state in self.tasks.items():
            if (state == "promised" and name not in there) or (state == "over" and name in there):
                raise Violation(f"A: {name} is {state}, and node {node.name} has it otherwise")
        for uid, one in self.objects.items():
            instance = catalogue.instance(uid)
            if one.deleted and instance is not None:
                raise Violation(f"G: {uid} was deleted and is on node {node.name}")
            if instance is None:
                if one.acknowledged and not one.deleting:
                    raise Violation(f"A: {uid} was acknowledged and isn't on node {node.name}")
                continue
            put = instance.put
            if put.digest not in one.versions:
                raise Violation(f"A: node {node.name} holds another version of {uid} than what was last acknowledged")
            location = catalogue.location(instance.seq)
            if location is None and self.careless:
                continue
            if location is None:
                raise Violation(f"D: node {node.name} has no copy of {uid}")
            disk_path = next((p for p, disk in node.machine.disks.items() if disk.volume_id == location.volume), None)
            if disk_path is None and self.careless:
                continue
            if disk_path is None:
                raise Violation(f"D: the copy of {uid} on node {node.name} is on a disk that isn't there")
            volume = node.machine.open_volume(disk_path)
            name = volume.locate(location)
            if name is None or digest_of(volume, name, put.offset) != (put.digest, put.length):
                raise Violation(f"A: the copy of {uid} on node {node.name} isn't what was acknowledged")
            said = description_of(volume, name)  # a disk that was full may have kept it from saying anything
            if said is not None and (said.seq, said.digest) != (instance.seq, put.digest):
                raise Violation(f"the file of {uid} on node {node.name} says that it is entry {said.seq}")
            held.pop(f"{location.volume}/{location.path}", None)
        found = Counter(location.volume for _, location in catalogue.locations())
        if catalogue.copies_on() != found:
            raise Violation(f"{node.name} counts {catalogue.copies_on()} copies, and has {found}")
        if held and not self.careless:
            raise Violation(f"D: files on node {node.name} that the catalogue doesn't name: {sorted(held)[:2]}")


def _log(node: StoreNode) -> Iterator[tuple[int, int, Any]]:
    for entry in Catalogue(node.machine.kv).entries(1, 1 << 30):
        yield entry.epoch, entry.seq, entry.operation


SMALL: Final = {
    (blocks, "BLOCK_BYTES"): 2048,
    (incoming, "BLOCK_BYTES"): 2048,
    (reading, "WHOLE_BYTES"): 4096,
    (incoming, "CHUNK_BYTES"): 512,
    (incoming, "WRITE_BYTES"): 2048,
    (incoming, "BACKLOG_BYTES_MAX"): 4096,
    (incoming, "INLINE_BYTES_MAX"): 1000 + len(HEADER),
    (giving, "READ_BYTES"): 512,
    (giving, "BEGIN_BYTES"): 2048,
    (giving, "WINDOW_BYTES"): 8192,
    (peering, "UNCLAIMED_S"): 3.0,
    (healing, "RETRY_S"): 1.0,
    (transfer, "ROWS_AT_ONCE"): 3,
    (forgetting, "FORGET_S"): 2.0,
    (checkpoints, "CHECKPOINT_INTERVAL_S"): 1.0,
    (environment, "SEGMENT_BYTES_MIN"): 0,
    (tidying, "SWEEP_S"): 2.0,
    (copies, "BLOCK_BYTES"): 1024,
    (mirroring, "BLOCK_BYTES"): 1024,
    (own_copies, "BLOCK_BYTES"): 1024,
    (keeper, "BLOCK_BYTES"): 1024,
    (mirror, "WINDOW_BYTES"): 4096,
    (catching_up, "AGAIN_S"): 1.0,
    (share_copies, "LOOK_S"): 1.0,
    (share_copies, "RESTS_S"): 5.0,
    (share_copies, "LOST_AGAIN_S"): 2.0,
    (share_copies, "PARTS"): 256,
    (scrub, "REST_S"): 1.0,
}


@contextlib.contextmanager
def small() -> Iterator[None]:
    """Sizes that make small objects long ones, and short waits."""
    before = {(module, name): getattr(module, name) for module, name in SMALL}
    for (module, name), value in SMALL.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def run(seed: int) -> dict[str, Any]:
    """Run one seed; returns counts, raises Violation."""
    crash.arm("")
    with small():
        world = StoreWorld(seed)
        drive(world)
        objects = sum(bool(one.acknowledged) for one in world.objects.values())
        files = world.files.answered if world.files else 0
        return {"entries": world._number, "acknowledged": objects + world.known.answered + files}
