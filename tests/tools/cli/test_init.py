"""A new cluster's files, and that its certificates do what they are for."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from click.testing import CliRunner

from conf.settings import TlsSettings, load
from conf.tls import CertificatesBad, MutualTls
from storage.replication.link import Link
from storage.replication.network import Tcp
from storage.replication.routes import Routes
from tests.conftest import free_port
from tools.cli.main import main

WORDS = ["--node", "a=127.0.0.1,127.0.0.2", "--node", "b=127.0.0.3,127.0.0.4", "--witness", "w=127.0.0.5"]
VIP = ["--vip", "10.0.0.100/24", "--read-vip", "fd00::5/64"]


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, list(words))
    return done.exit_code, done.output


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    code, output = run("init", str(tmp_path / "cluster"), *WORDS, *VIP)
    assert code == 0, output
    return tmp_path / "cluster"


def tls_of(home: Path) -> MutualTls:
    folder = home / "tls"
    return MutualTls(TlsSettings(ca_file=folder / "ca.crt", certificate=folder / "node.crt", key=folder / "node.key"))


OPEN: list[asyncio.Transport] = []


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    """Every connection of a test has ended when the test has."""
    yield
    for transport in OPEN:
        transport.abort()
    OPEN.clear()
    await asyncio.sleep(0)


class Talk(asyncio.Protocol):
    def __init__(self) -> None:
        self.got, self.lost = asyncio.Event(), asyncio.Event()
        self.certificate = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        OPEN.append(cast(asyncio.Transport, transport))
        self.certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        transport.write(b"hello")

    def data_received(self, _: bytes) -> None:
        self.got.set()

    def connection_lost(self, _: Exception | None) -> None:
        self.lost.set()


async def heard(own: Path, peer: Path, port: int, name: str, door: list[Talk]) -> Talk:
    """A connection from `own` to `peer`, over which both have heard the other."""
    talk, before = Talk(), len(door)
    await Tcp("127.0.0.2", "127.0.0.4", port, tls_of(own), name).connect(lambda: talk)
    async with asyncio.timeout(30):
        while len(door) == before:
            await asyncio.sleep(0.01)
        await door[-1].got.wait()
        await talk.got.wait()
    return talk


async def opened(home: Path, port: int) -> tuple[Tcp, list[Talk]]:
    door: list[Talk] = []

    def accepted() -> Talk:
        door.append(Talk())
        return door[-1]

    listening = Tcp("127.0.0.4", "127.0.0.2", port, tls_of(home), "a")
    await listening.listen(accepted)
    return listening, door


def test_each_node_finds_its_settings(cluster: Path) -> None:
    a, b = (load(cluster / node / "node.toml", {}).cluster for node in ("a", "b"))
    assert a
    assert b
    assert (a.peer, a.address, a.peer_address) == ("b", "127.0.0.2", "127.0.0.4")
    assert [(link.address, link.peer_address) for link in b.links] == [("127.0.0.3", "127.0.0.1")]
    assert a.etcd[0] == "https://127.0.0.1:2379"
    assert [(vip.address, vip.prefer) for vip in b.vips] == [("10.0.0.100/24", "primary"), ("fd00::5/64", "standby")]
    assert (cluster / "a" / "tls" / "node.key").stat().st_mode & 0o777 == 0o640
    assert (cluster / "authority" / "ca.key").stat().st_mode & 0o777 == 0o600
    environment = (cluster / "w" / "etcd.env").read_text()
    assert "ETCD_CLIENT_CERT_AUTH=true\n" in environment
    assert "a=https://127.0.0.1:2380,b=https://127.0.0.3:2380,w=https://127.0.0.5:2380" in environment


def test_what_is_wrong_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    folder = str(tmp_path / "cluster")
    for words, says in (
        ([*WORDS, "--vip", "10.0.0.100"], "with its prefix"),
        ([*WORDS, "--vip", "nonsense"], "cluster.vips"),
        ([*WORDS[2:], *VIP], "give --node twice"),
        (["--node", "a=1.2.3.4", "--node", "a=1.2.3.5", "--witness", "w=1.2.3.6", *VIP], "three names"),
        (["--node", "a=1.2.3.4,5.6.7.8", "--node", "b=1.2.3.5", "--witness", "w=1.2.3.6", *VIP], "private address"),
    ):
        code, output = run("init", folder, *words)
        assert code == 2, output
        assert says in output
        assert not Path(folder).exists()


def test_a_strict_umask_does_not_lock_the_nodes_out(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        assert run("init", str(tmp_path / "cluster"), *WORDS, *VIP)[0] == 0
    finally:
        os.umask(before)
    home = tmp_path / "cluster" / "a"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (home, *home.rglob("*"))}
    assert modes["node.key"] == 0o640
    assert modes["a"] == modes["tls"] == 0o755
    assert modes["node.toml"] == modes["etcd.env"] == modes["node.crt"] == 0o644


def test_a_cluster_is_not_overwritten(cluster: Path) -> None:
    before = (cluster / "authority" / "ca.key").read_bytes()
    code, output = run("init", str(cluster), *WORDS, *VIP)
    assert (code, "tandem renew" in output) == (2, True)
    assert (cluster / "authority" / "ca.key").read_bytes() == before


async def test_nodes_of_a_cluster_hear_each_other(cluster: Path) -> None:
    port = free_port()
    listening, door = await opened(cluster / "b", port)
    await heard(cluster / "a", cluster / "b", port, "b", door)
    listening.close()


async def test_a_stranger_is_not_heard(cluster: Path, tmp_path: Path) -> None:
    """Neither one of another cluster, nor a member that isn't who was called."""
    port = free_port()
    assert run("init", str(tmp_path / "other"), *WORDS, *VIP)[0] == 0
    listening, door = await opened(cluster / "b", port)
    with pytest.raises(OSError):
        await Tcp("127.0.0.2", "127.0.0.4", port, tls_of(tmp_path / "other" / "a"), "b").connect(Talk)
    with pytest.raises(OSError):
        await Tcp("127.0.0.2", "127.0.0.4", port, tls_of(cluster / "a"), "w").connect(Talk)
    assert not any(talk.got.is_set() for talk in door)
    listening.close()


async def test_another_member_is_not_taken_for_the_peer(cluster: Path) -> None:
    """The witness has a certificate of the cluster, but it isn't node a."""
    port = free_port()
    listening = Tcp("127.0.0.4", "127.0.0.2", port, tls_of(cluster / "b"), "a")
    used: list[Link] = []
    ended: list[str] = []

    def routes(dial: bool, network: Tcp) -> Routes:
        def down(link: Link) -> None:
            ended.append(link.why_closed)

        return Routes(dial=dial, networks=[network], on_up=used.append, on_frame=lambda *_: None, on_down=down)

    answers = routes(False, listening)
    await answers.start()
    for home, taken in (("w", False), ("a", True)):
        used.clear()
        dials = routes(True, Tcp("127.0.0.2", "127.0.0.4", port, tls_of(cluster / home), "b"))
        await dials.start()
        async with asyncio.timeout(60):
            if taken:
                while len(used) < 2:  # both ends say so
                    await asyncio.sleep(0.02)
            else:
                while "the certificate of another machine" not in ended:
                    await asyncio.sleep(0.02)
                assert not any(row["used"] for row in answers.status())
        dials.stop()
        await asyncio.sleep(0.1)
    answers.stop()
    await asyncio.sleep(0.1)


async def test_authorities_may_follow_each_other(cluster: Path, tmp_path: Path) -> None:
    """While a new one replaces the old, both are in ca.crt, and members of both hear each other."""
    newer = tmp_path / "newer"
    assert run("init", str(newer), *WORDS, *VIP)[0] == 0
    both = (cluster / "authority" / "ca.crt").read_text() + (newer / "authority" / "ca.crt").read_text()
    for home in (cluster / "a", cluster / "b", newer / "a", newer / "b"):
        (home / "tls" / "ca.crt").write_text(both)
    for listens, dials in ((cluster / "b", newer / "a"), (newer / "b", cluster / "a")):
        port = free_port()
        listening, door = await opened(listens, port)
        await heard(dials, listens, port, "b", door)
        listening.close()


async def test_renewed_certificates_are_used_without_a_restart(cluster: Path) -> None:
    port = free_port()
    listening, door = await opened(cluster / "b", port)
    before = await heard(cluster / "a", cluster / "b", port, "b", door)
    code, output = run("renew", str(cluster), "--json")
    assert code == 0, output
    assert set(json.loads(output)["until"]) == {"a", "b", "w"}
    after = await heard(cluster / "a", cluster / "b", port, "b", door)
    assert before.certificate != after.certificate
    assert not before.lost.is_set()
    (cluster / "b" / "tls" / "node.crt").write_text("half a certif")  # while it is being written
    kept = await heard(cluster / "a", cluster / "b", port, "b", door)
    assert kept.certificate == after.certificate
    listening.close()


def test_certificates_that_are_none_are_refused_in_one_line(cluster: Path) -> None:
    (cluster / "a" / "tls" / "node.key").write_text("nonsense")
    with pytest.raises(CertificatesBad, match=r"node\.key"):
        tls_of(cluster / "a")
