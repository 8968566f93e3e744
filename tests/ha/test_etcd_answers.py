"""Whatever answers on etcd's port: a value, or EtcdError."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from ha.etcd import Compare, EtcdError, HttpEtcd, KeyValue, PutKey
from tests.conftest import FUZZ, free_port

BATCH = 20

numbers = st.one_of(
    st.integers(-5, 5), st.integers(0, 2**70), st.just("9" * 5000), st.just("x"), st.floats(), st.none()
)
texts = st.one_of(st.just(""), st.just("YQ=="), st.just("/w=="), st.text(max_size=6), st.none(), st.integers())
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
answers = st.one_of(
    st.binary(max_size=60),
    values.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {},
        optional={
            "kvs": st.lists(
                st.one_of(
                    values,
                    st.fixed_dictionaries(
                        {"key": texts, "create_revision": numbers, "mod_revision": numbers},
                        optional={"value": texts, "lease": numbers},
                    ),
                ),
                max_size=3,
            )
            | values,
            "ID": numbers,
            "TTL": numbers,
            "result": st.one_of(values, st.fixed_dictionaries({"TTL": numbers})),
            "succeeded": values,
            "error": values,
        },
    ).map(lambda value: json.dumps(value).encode()),
    st.just(b"[" * 100_000),
)
statuses = st.sampled_from([200, 200, 200, 400, 404, 500, 503])


async def asked(client: HttpEtcd) -> None:
    """Each request once. Raises whatever isn't EtcdError, or what isn't of the right type."""
    calls: list[tuple[Callable[[], Awaitable[Any]], type | tuple[type, ...]]] = [
        (lambda: client.get_prefix("/t/"), list),
        (lambda: client.txn((Compare("/t/x", "mod", 1),), (PutKey("/t/x", "y"),)), bool),
        (lambda: client.grant(5), int),
        (lambda: client.keepalive(7), float),
        (lambda: client.revoke(7), type(None)),
    ]
    for call, kind in calls:
        try:
            found = await call()
        except EtcdError:
            continue
        assert isinstance(found, kind)
        assert not isinstance(found, list) or all(isinstance(one, KeyValue) for one in found)


async def _tried(given_answers: list[tuple[int, bytes]]) -> None:
    now = [(200, b"{}")]

    async def answer(_: web.Request) -> web.Response:
        status, body = now[0]
        return web.Response(status=status, body=body, content_type="application/json")

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    client = HttpEtcd([f"http://127.0.0.1:{port}"], 30.0)
    try:
        for one in given_answers:
            now[0] = one
            await asked(client)
            async for _ in client.watch("/t/"):
                pass
    finally:
        await client.close()
        await runner.cleanup()


@given(st.lists(st.tuples(statuses, answers), min_size=1, max_size=BATCH))
@settings(max_examples=40 * FUZZ)
def test_any_answer_is_a_value_or_the_one_error(given_answers: list[tuple[int, bytes]]) -> None:
    asyncio.run(_tried(given_answers))
