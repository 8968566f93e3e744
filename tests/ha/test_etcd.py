"""The etcd client against a real etcd."""

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ha.etcd import Compare, DeleteKey, EtcdError, HttpEtcd, PutKey
from tests.conftest import free_port, wait_for


@pytest.fixture
async def etcd(tmp_path: Path) -> AsyncIterator[HttpEtcd]:
    client_url, peer_url = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
    (tmp_path / "data").mkdir(mode=0o700)
    words = f"--name x --listen-client-urls {client_url} --advertise-client-urls {client_url} --log-level error"
    words += f" --listen-peer-urls {peer_url} --initial-advertise-peer-urls {peer_url} --initial-cluster x={peer_url}"
    process = subprocess.Popen(["etcd", "--data-dir", str(tmp_path / "data"), *words.split()])
    client = HttpEtcd(["http://127.0.0.1:1", client_url], 5.0)
    try:
        async with asyncio.timeout(60):
            while True:
                try:
                    await client.get_prefix("/")
                    break
                except EtcdError:
                    await asyncio.sleep(0.1)
        yield client
    finally:
        await client.close()
        process.kill()
        process.wait()


async def test_transaction_compares_revisions(etcd: HttpEtcd) -> None:
    new = Compare("/t/state", "create", 0)
    assert await etcd.txn((new,), (PutKey("/t/state", "eins"),))
    assert not await etcd.txn((new,), (PutKey("/t/state", "zwei"),))
    [kv] = await etcd.get_prefix("/t/")
    assert (kv.key, kv.value, kv.lease) == ("/t/state", "eins", 0)
    assert await etcd.txn((Compare("/t/state", "mod", kv.mod_revision),), (PutKey("/t/state", "Äpfel"),))
    assert not await etcd.txn((Compare("/t/state", "mod", kv.mod_revision),), (DeleteKey("/t/state"),))
    [after] = await etcd.get_prefix("/t/")
    assert after.value == "Äpfel"
    assert after.create_revision == kv.create_revision


async def test_lease_takes_its_keys_along(etcd: HttpEtcd) -> None:
    lease = await etcd.grant(60)
    assert await etcd.keepalive(lease) == 60
    assert await etcd.txn((), (PutKey("/t/leader", "a", lease),))
    [kv] = await etcd.get_prefix("/t/")
    assert kv.lease == lease
    await etcd.revoke(lease)
    assert await etcd.get_prefix("/t/") == []
    assert await etcd.keepalive(lease) == 0


async def test_watch_wakes(etcd: HttpEtcd) -> None:
    await etcd.get_prefix("/")
    woken = asyncio.Event()

    async def watch() -> None:
        async for _ in etcd.watch("/t/"):
            woken.set()

    task = asyncio.create_task(watch())
    async with asyncio.timeout(60):
        while not woken.is_set():
            await etcd.txn((), (PutKey("/t/x", "1"),))
            await asyncio.sleep(0.05)
    task.cancel()


def listens(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=1).close()
    except OSError:
        return False
    return True


async def test_people_wait_for_a_leader_to_be_elected(tmp_path: Path) -> None:
    """Two members of three are enough; one alone answers that it has no leader, until another one is there."""
    peers = {name: f"http://127.0.0.1:{free_port()}" for name in "xyz"}
    clients = {name: f"http://127.0.0.1:{free_port()}" for name in "xyz"}
    cluster = ",".join(f"{name}={url}" for name, url in peers.items())

    def start(name: str) -> subprocess.Popen[bytes]:
        (tmp_path / name).mkdir(mode=0o700)
        words = f"--name {name} --listen-client-urls {clients[name]} --advertise-client-urls {clients[name]}"
        words += f" --listen-peer-urls {peers[name]} --initial-advertise-peer-urls {peers[name]} --log-level error"
        words += f" --initial-cluster {cluster} --data-dir {tmp_path / name}"
        return subprocess.Popen(["etcd", *words.split()])

    running = [start("x")]
    patient = HttpEtcd(list(clients.values()), 1.0, patience_s=120.0)
    try:
        await asyncio.to_thread(wait_for, lambda: listens(clients["x"]), "the first member to listen")
        asking = asyncio.create_task(patient.txn((), (PutKey("/t/x", "1"),)))
        await asyncio.sleep(3.0)
        assert not asking.done()
        running.append(start("y"))
        assert await asking
        assert [kv.value for kv in await patient.get_prefix("/t/")] == ["1"]
    finally:
        await patient.close()
        for process in running:
            process.kill()
            process.wait()


async def test_nobody_there() -> None:
    client = HttpEtcd(["http://127.0.0.1:1"], 1.0)
    with pytest.raises(EtcdError):
        await client.get_prefix("/")
    await client.close()
