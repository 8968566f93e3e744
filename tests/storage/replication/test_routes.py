"""Several networks between two nodes, over real TCP on loopback addresses."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from storage.replication.link import Kind, Link
from storage.replication.network import NewProtocol, Tcp
from storage.replication.routes import WIRE, Greeting, Routes
from tests.conftest import free_port

LIMIT_S = 60


class Cable(Tcp):
    """A network that can be cut: it swallows what is sent, as a cable that is out does."""

    cut = False

    async def connect(self, connected: NewProtocol) -> None:
        if self.cut:
            await asyncio.sleep(0.2)
            raise TimeoutError
        await super().connect(connected)


class Node:
    def __init__(self, dial: bool, networks: list[Tcp]) -> None:
        self.up: list[Link] = []
        self.downs: list[str] = []
        self.heard: list[bytes] = []
        self.routes = Routes(
            dial=dial,
            networks=networks,
            on_up=self.up.append,
            on_frame=lambda link, kind, stream, payload: self.heard.append(bytes(payload)),
            on_down=lambda link: self.downs.append(link.why_closed),
        )

    @property
    def used(self) -> list[str]:
        return [row["route"] for row in self.routes.status() if row["used"]]


async def until(condition: object) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.02)


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Node, Node, list[Cable]]]:
    port = free_port()
    there = [Cable("127.0.0.11", "127.0.0.21", port), Cable("127.0.0.12", "127.0.0.22", port)]
    here = [Tcp("127.0.0.21", "127.0.0.11", port), Tcp("127.0.0.22", "127.0.0.12", port)]
    dials, answers = Node(True, list(there)), Node(False, list(here))
    await answers.routes.start()
    await dials.routes.start()
    await until(lambda: dials.up and answers.up and all(row["up"] for row in dials.routes.status()))
    yield dials, answers, there
    dials.routes.stop()
    answers.routes.stop()
    await asyncio.sleep(0.05)


def swallow(node: Node, name: str) -> None:
    """From now on nothing that is sent over this network arrives."""
    for route in node.routes._routes:
        if route.network.name == name and route.probe:
            route.probe.send = lambda *_: None  # type: ignore[method-assign]


async def test_the_first_network_is_preferred(pair: tuple[Node, Node, list[Cable]]) -> None:
    dials, answers, _ = pair
    assert dials.used == ["127.0.0.11 - 127.0.0.21"]
    await until(lambda: answers.used == ["127.0.0.21 - 127.0.0.11"])
    dials.up[-1].send(Kind.MESSAGE, 0, b"hello")
    await until(lambda: answers.heard == [b"hello"])


async def test_a_silent_network_is_left_for_one_that_answers(pair: tuple[Node, Node, list[Cable]]) -> None:
    dials, answers, cables = pair
    cables[0].cut = True
    swallow(dials, cables[0].name)
    await until(lambda: len(answers.up) > 1 and dials.used == [cables[1].name])
    assert dials.downs[0] == "its network is silent"
    dials.up[-1].send(Kind.MESSAGE, 0, b"again")
    await until(lambda: answers.heard == [b"again"])
    assert [row["up"] for row in dials.routes.status()] == [False, True]


async def test_a_network_that_takes_bytes_is_not_left_for_a_lost_probe(
    pair: tuple[Node, Node, list[Cable]],
) -> None:
    """A network full of images drops what it has no room for, and a probe is sent again only after a second or so."""
    dials, answers, cables = pair
    swallow(dials, cables[0].name)
    sent = 0
    while not dials.routes._routes[0].missed > 10:
        dials.up[-1].send(Kind.MESSAGE, 0, b"a part of an image")
        sent += 1
        await asyncio.sleep(0.05)
    await until(lambda: len(answers.heard) == sent)
    assert (dials.used, dials.downs) == ([cables[0].name], [])


async def test_two_silent_networks_are_not_swapped(pair: tuple[Node, Node, list[Cable]]) -> None:
    dials, _, cables = pair
    for cable in cables:
        cable.cut = True
        swallow(dials, cable.name)
    await until(lambda: not any(row["up"] for row in dials.routes.status()))
    assert len(dials.up) == 1


async def test_who_speaks_another_protocol_is_not_listened_to(pair: tuple[Node, Node, list[Cable]]) -> None:
    _, answers, cables = pair
    before = len(answers.up)
    strange: list[Link] = []
    await cables[1].connect(lambda: Link(strange.append, lambda *_: None, lambda _: strange.clear()))
    await until(lambda: strange)
    strange[0].send(Kind.USE, 0, msgspec.msgpack.encode(Greeting((WIRE[0] + 1, 0), "9.9")))
    await until(lambda: not strange)
    assert len(answers.up) == before


async def test_strangers_that_say_nothing_are_bounded(pair: tuple[Node, Node, list[Cable]]) -> None:
    dials, answers, cables = pair
    made: list[Link] = []
    for _ in range(40):
        await cables[1].connect(lambda: Link(made.append, lambda *_: None, lambda _: None))
    await until(lambda: len(answers.routes._links) <= 16)
    dials.up[-1].send(Kind.MESSAGE, 0, b"still here")
    await until(lambda: b"still here" in answers.heard)
    for link in made:
        link.close("over")


async def test_an_address_that_is_not_here_holds_up_nothing() -> None:
    """A cable that is out when the node starts: its network is listened to later, the others at once."""
    port = free_port()
    here = [Tcp("203.0.113.1", "203.0.113.2", port), Tcp("127.0.0.22", "127.0.0.12", port)]
    there = [Cable("203.0.113.2", "203.0.113.1", port), Cable("127.0.0.12", "127.0.0.22", port)]
    answers, dials = Node(False, list(here)), Node(True, list(there))
    await answers.routes.start()
    await dials.routes.start()
    await until(lambda: dials.used == [there[1].name] and answers.used)
    for node in (dials, answers):
        node.routes.stop()
    await asyncio.sleep(0.05)


async def test_a_late_dialling_does_not_take_the_place_of_a_newer_one(pair: tuple[Node, Node, list[Cable]]) -> None:
    dials, answers, cables = pair
    await until(lambda: answers.up)
    start, number = answers.routes._greeted_by
    strange: list[Link] = []
    await cables[1].connect(lambda: Link(strange.append, lambda *_: None, lambda _: strange.clear()))
    await until(lambda: strange)
    strange[0].send(Kind.USE, 0, msgspec.msgpack.encode(Greeting((1, 0), "1", start, number - 1)))
    await until(lambda: not strange)
    dials.up[-1].send(Kind.MESSAGE, 0, b"still here")
    await until(lambda: answers.heard == [b"still here"])


async def test_a_network_that_only_answers_probes_is_left() -> None:
    """New connections over it end at once; the other one is used, and stays in use."""
    port = free_port()
    here = [Tcp("127.0.0.21", "127.0.0.11", port), Tcp("127.0.0.22", "127.0.0.12", port)]
    there = [Cable("127.0.0.11", "127.0.0.21", port), Cable("127.0.0.12", "127.0.0.22", port)]
    answers, dials = Node(False, list(here)), Node(True, list(there))

    stay: list[Link] = []

    def ends_at_once(link: Link) -> None:
        dials.up.append(link)
        if dials.used == [there[0].name]:
            link.close("too large for this network")
        else:
            stay.append(link)

    dials.routes._on_up = ends_at_once
    await answers.routes.start()
    await dials.routes.start()
    await until(lambda: stay and dials.used == [there[1].name] and answers.used == [here[1].name])
    count = len(dials.up)
    await asyncio.sleep(3)
    assert len(dials.up) == count
    for node in (dials, answers):
        node.routes.stop()
    await asyncio.sleep(0.05)
