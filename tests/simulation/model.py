"""The world around the pure cores: disk, link and etcd models whose every delay and fault comes from one seed."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ha.etcd import Compare, KeyValue, PutKey, Unknown
from tests.simulation.virtual import Process, VirtualLoop


@dataclass
class Disk:
    """What a node keeps when its power goes."""

    store_id: str
    log: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    owed: set[int] = field(default_factory=set)  # entries of the log that came without their bytes
    promised: int = 0
    incarnation: int = 0
    applied: int = 0
    cluster_id: str = ""


class SimEtcd:
    """One linearizable store. Requests and answers take time and get lost; leases end by its own clock."""

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self._loop, self._rng = loop, rng
        self._keys: dict[str, KeyValue] = {}
        self._leases: dict[int, tuple[float, float]] = {}
        self._revision = 0
        self._next_lease = 100
        self.down = False

    def _expire(self) -> None:
        now = self._loop.now
        for lease, (deadline, _) in list(self._leases.items()):
            if deadline <= now:
                del self._leases[lease]
                for key in [key for key, kv in self._keys.items() if kv.lease == lease]:
                    del self._keys[key]
                    self._revision += 1

    def get_prefix(self, prefix: str) -> list[KeyValue]:
        self._expire()
        return [kv for key, kv in self._keys.items() if key.startswith(prefix)]

    def txn(self, compare: Sequence[Compare], then: Sequence[Any]) -> bool:
        self._expire()
        for condition in compare:
            kv = self._keys.get(condition.key)
            revision = 0 if kv is None else kv.create_revision if condition.target == "create" else kv.mod_revision
            if revision != condition.revision:
                return False
        if any(isinstance(change, PutKey) and change.lease and change.lease not in self._leases for change in then):
            raise Unknown("requested lease not found")
        self._revision += 1
        for change in then:
            if isinstance(change, PutKey):
                old = self._keys.get(change.key)
                created = old.create_revision if old else self._revision
                self._keys[change.key] = KeyValue(change.key, change.value, created, self._revision, change.lease)
            else:
                self._keys.pop(change.key, None)
        return True

    def grant(self, ttl_s: int) -> int:
        self._next_lease += 1
        self._leases[self._next_lease] = (self._loop.now + ttl_s, ttl_s)
        return self._next_lease

    def keepalive(self, lease: int) -> float:
        self._expire()
        if lease not in self._leases:
            return 0
        ttl_s = self._leases[lease][1]
        self._leases[lease] = (self._loop.now + ttl_s, ttl_s)
        return ttl_s


class SimEtcdClient:
    """One node's way to etcd."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, store: SimEtcd, process: Process, path: "Path") -> None:
        self._loop, self._rng, self._store, self._process, self._path = loop, rng, store, process, path

    async def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        answer: asyncio.Future[Any] = self._loop.create_future()

        def reply(result: Any, error: Exception | None) -> None:
            if not answer.done():
                if error:
                    answer.set_exception(error)
                else:
                    answer.set_result(result)

        def arrive() -> None:
            if self._store.down or not self._path.up:
                return
            try:
                result, error = method(*args), None
            except Unknown as unknown:
                result, error = None, unknown
            if self._rng.random() < self._path.loss:
                return
            self._loop.post(self._process, self._delay(), reply, result, error)

        if self._rng.random() >= self._path.loss:
            self._loop.post(None, self._delay(), arrive)  # on the wire: arrives even if the sender dies meanwhile
        try:
            return await asyncio.wait_for(answer, 1.0)
        except TimeoutError:
            raise Unknown("no answer") from None

    def _delay(self) -> float:
        quick = self._rng.random() >= self._path.slow
        return self._rng.choice((0.001, 0.002, 0.005, 0.02)) if quick else self._rng.random() * 3

    async def get_prefix(self, prefix: str) -> list[KeyValue]:
        return await self._call(self._store.get_prefix, prefix)

    async def txn(self, compare: Sequence[Compare], then: Sequence[Any]) -> bool:
        return await self._call(self._store.txn, compare, then)

    async def grant(self, ttl_s: int) -> int:
        return await self._call(self._store.grant, ttl_s)

    async def revoke(self, lease: int) -> None:
        raise NotImplementedError

    async def keepalive(self, lease: int) -> float:
        return await self._call(self._store.keepalive, lease)


@dataclass
class Path:
    """One direction of a cable."""

    up: bool = True
    loss: float = 0.0
    slow: float = 0.05  # share of answers that take up to seconds
