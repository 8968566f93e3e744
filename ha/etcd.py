"""A small etcd v3 client over its JSON gateway (`/v3/...`), with the three things we need: leases, transactions, watch.

Keys and values are text here and base64 on the wire. Reads are linearizable. A transaction whose answer was lost
raises `Unknown`: it may or may not have been applied, and the caller reads back. Source: etcd 3.4
`api_grpc_gateway`, `rpc.proto`.
"""

import asyncio
import base64
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from conf.tls import MutualTls

AGAIN_S = 0.2  # between two rounds of all endpoints


class EtcdError(Exception):
    """etcd can't be reached or refused the request."""


class Unknown(EtcdError):
    """The request may have been applied."""


class Refused(Unknown):
    """Nothing listens there."""


@dataclass(frozen=True)
class KeyValue:
    key: str
    value: str
    create_revision: int
    mod_revision: int
    lease: int


@dataclass(frozen=True)
class Compare:
    """The key's revision must be this; 0 means that the key doesn't exist."""

    key: str
    target: str  # "create" or "mod"
    revision: int


@dataclass(frozen=True)
class PutKey:
    key: str
    value: str
    lease: int = 0


@dataclass(frozen=True)
class DeleteKey:
    key: str


class Etcd(Protocol):
    """What the agent needs; the real client and the simulation's model answer it."""

    async def get_prefix(self, prefix: str) -> list[KeyValue]: ...
    async def txn(self, compare: Sequence[Compare], then: Sequence[PutKey | DeleteKey]) -> bool: ...
    async def grant(self, ttl_s: int) -> int: ...
    async def keepalive(self, lease: int) -> float:
        """Returns the new time to live in seconds, 0 if the lease is gone."""
        ...

    async def revoke(self, lease: int) -> None: ...


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _text(data: str) -> str:
    return base64.b64decode(data).decode()


def _range_end(prefix: str) -> str:
    """The key after all that begin with `prefix`."""
    raw = bytearray(prefix.encode())
    raw[-1] += 1
    return base64.b64encode(bytes(raw)).decode()


@contextmanager
def _understood() -> Iterator[None]:
    """What is made of an answer. Raises EtcdError for one that isn't etcd's."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EtcdError(f"an answer that isn't etcd's: {type(error).__name__}") from error


class HttpEtcd:
    """Tries the endpoints in turn and stays with one that answers."""

    def __init__(
        self, endpoints: Sequence[str], timeout_s: float, tls: MutualTls | None = None, patience_s: float = 0.0
    ) -> None:
        """`tls`: for endpoints whose URLs say https. `patience_s`: how long to go on asking when none of them answers
        as it should, as while they elect a leader, but one is there; each is asked once in any case."""
        self._tls, self._patience_s = tls, patience_s
        self._endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, connect=min(0.7, timeout_s))
        self._current = 0
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session:
            await self._session.close()

    @property
    def _ssl(self) -> Any:
        return self._tls.dialling() if self._tls else True

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        return self._session

    async def _post_once(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        url = self._endpoints[self._current] + path
        try:
            async with self._http().post(url, json=body, timeout=self._timeout, ssl=self._ssl) as response:
                answer: Any = await response.json(content_type=None)
                if not isinstance(answer, dict):
                    raise ValueError("an answer that isn't etcd's")
                if response.status >= 500:  # it has no leader, or took too long: it may be applied yet
                    raise aiohttp.ClientError(str(answer.get("error") or response.status))
                if response.status != 200:
                    raise EtcdError(f"{url}: {answer.get('error') or response.status}")
                return answer
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError) as error:
            self._current = (self._current + 1) % len(self._endpoints)
            kind = Refused if isinstance(error, aiohttp.ClientConnectorError) else Unknown
            raise kind(f"{url}: {error or type(error).__name__}") from error

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """For requests that may be repeated."""
        until = time.monotonic() + self._patience_s
        while True:
            failed: list[Unknown] = []
            for _ in self._endpoints:
                try:
                    return await self._post_once(path, body)
                except Unknown as error:
                    failed.append(error)
            if time.monotonic() >= until or all(isinstance(one, Refused) for one in failed):
                raise failed[-1]
            await asyncio.sleep(AGAIN_S)

    async def call(self, path: str, **given: Any) -> dict[str, Any]:
        """Any other request of the API. Raises EtcdError."""
        return await self._post(path, given)

    async def get_prefix(self, prefix: str) -> list[KeyValue]:
        answer = await self._post("/v3/kv/range", {"key": _b64(prefix), "range_end": _range_end(prefix)})
        with _understood():
            return [
                KeyValue(
                    _text(kv["key"]),
                    _text(kv.get("value", "")),
                    int(kv["create_revision"]),
                    int(kv["mod_revision"]),
                    int(kv.get("lease", 0)),
                )
                for kv in answer.get("kvs", [])
            ]

    async def txn(self, compare: Sequence[Compare], then: Sequence[PutKey | DeleteKey]) -> bool:
        conditions = []
        for condition in compare:
            field = f"{condition.target}_revision"
            conditions.append(
                {
                    "key": _b64(condition.key),
                    "target": condition.target.upper(),
                    "result": "EQUAL",
                    field: str(condition.revision),
                }
            )
        changes: list[dict[str, Any]] = []
        for change in then:
            if isinstance(change, PutKey):
                put = {"key": _b64(change.key), "value": _b64(change.value), "lease": str(change.lease)}
                changes.append({"request_put": put})
            else:
                changes.append({"request_delete_range": {"key": _b64(change.key)}})
        post = self._post_once if compare else self._post  # without a condition it may be repeated
        answer = await post("/v3/kv/txn", {"compare": conditions, "success": changes})
        return bool(answer.get("succeeded"))

    async def grant(self, ttl_s: int) -> int:
        answer = await self._post("/v3/lease/grant", {"TTL": str(ttl_s)})
        with _understood():
            return int(answer["ID"])

    async def keepalive(self, lease: int) -> float:
        answer = await self._post("/v3/lease/keepalive", {"ID": str(lease)})
        with _understood():
            ttl_s = float(answer.get("result", {}).get("TTL", 0))
            if not math.isfinite(ttl_s):
                raise ValueError(ttl_s)
            return ttl_s

    async def revoke(self, lease: int) -> None:
        await self._post("/v3/lease/revoke", {"ID": str(lease)})

    async def watch(self, prefix: str) -> AsyncIterator[None]:
        """Yields once for every change below `prefix`; ends when the stream breaks."""
        body = {"create_request": {"key": _b64(prefix), "range_end": _range_end(prefix)}}
        url = self._endpoints[self._current] + "/v3/watch"
        quiet = aiohttp.ClientTimeout(total=None, sock_connect=1.0, sock_read=60.0)
        try:
            async with self._http().post(url, json=body, timeout=quiet, ssl=self._ssl) as response:
                async for _line in response.content:
                    yield None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, asyncio.IncompleteReadError):
            return
