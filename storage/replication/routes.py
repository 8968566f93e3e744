"""The networks between the two gateways: one connection in use, and the state of each network.

The node whose name sorts first dials. It probes each network five times a second, on a connection of its own so that
no load and no slow disk makes a probe late. When the network in use stops answering while another one answers, the
connection goes there, within the time that the replication waits for a silent peer: one lost cable changes nothing.
A network full of images may lose a probe; while it takes bytes, it isn't silent. Only counts are compared, never times:
a pause of the machine holds up all networks alike.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import msgspec
import structlog

from conf import VERSION
from storage.replication.link import Kind, Link, OnFrame
from storage.replication.network import Network

log = structlog.get_logger()

WIRE: Final = (2, 1)  # a peer with another first number isn't talked to; the second grows with what may be ignored
PLAIN_FRAMES: Final = (2, 1)  # from here on frames need no checksum where there is TLS
DIAL_INTERVAL_S: Final = 0.2
PROBE_INTERVAL_S: Final = 0.2
MISSED_MAX: Final = 3  # probes without answer and nothing else acknowledged, while another network answers
MISSED_DEAD: Final = 15  # a probing connection is made anew
STEADY: Final = 150  # answers in a row before the preferred network is used again
SUSPECT_S: Final = 10.0  # a network that failed is behind the others for so long, while there is another
SHORT_S: Final = 5.0
LISTEN_AGAIN_S: Final = 1.0
HEARD_S: Final = 3.0
CONNECTIONS_MAX: Final = 16


class Greeting(msgspec.Struct, frozen=True):
    """With what a connection begins: the protocol's version, ours for people, which dialling it is of which start."""

    wire: tuple[int, int]
    version: str
    start: str = ""
    number: int = 0


class Route:
    """One network, as the node that dials sees it; `heard_at` as the other one does."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.probe: Link | None = None
        self.sent = self.answered = self.steady = 0
        self.heard_at = self.bad_at = float("-inf")
        self._acknowledged = self.quiet = 0
        self._said = ""

    def failed(self, why: str) -> None:
        """It couldn't be used, whatever the probes say."""
        self.bad_at, self.steady = asyncio.get_running_loop().time(), 0
        if why != self._said:
            log.warning("route.failed", route=self.network.name, why=why)
        self._said = why

    @property
    def suspect(self) -> bool:
        return asyncio.get_running_loop().time() - self.bad_at < SUSPECT_S

    @property
    def missed(self) -> int:
        return self.sent - self.answered

    def carried(self, acknowledged: int) -> None:
        """So many bytes that were sent over its connection have been acknowledged."""
        self.quiet = self.quiet + 1 if acknowledged == self._acknowledged else 0
        self._acknowledged = acknowledged

    def tick(self) -> None:
        """Send the next probe."""
        if self.missed >= MISSED_DEAD and self.probe:
            self.probe.close("no answer to probes")
        self.sent += 1
        self.steady = self.steady + 1 if self.missed <= MISSED_MAX else 0
        if self.probe:
            self.probe.send(Kind.PROBE, self.sent)


class Routes:
    def __init__(
        self,
        *,
        dial: bool,
        networks: Sequence[Network],
        on_up: Callable[[Link], None],
        on_frame: OnFrame,
        on_down: Callable[[Link], None],
    ) -> None:
        """`on_up(link)`: this connection is the one in use now, whatever was before."""
        self._dial = dial
        self._routes = [Route(network) for network in networks]
        self._on_up, self._on_frame, self._on_down = on_up, on_frame, on_down
        self._used: tuple[Route, Link] | None = None
        self._links: list[Link] = []  # those that the other node made, oldest first
        self._tasks: list[asyncio.Task[None]] = []
        self._used_since = 0.0
        self._start, self._number = uuid.uuid4().hex, 0  # of our Greetings
        self._greeted_by = ("", 0)  # of the newest one of the other node
        self._greeting = b""
        self._control: tuple[bytes, Link] | None = None  # the newest one that the other node made, and what it said
        self.peer_version = ""

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._dial:
            self._tasks += [loop.create_task(self._keep_listening(route)) for route in self._routes]
            return
        self._tasks.append(loop.create_task(self._keep_dialling()))
        if len(self._routes) > 1:
            self._tasks.append(loop.create_task(self._keep_choosing()))
            self._tasks += [loop.create_task(self._keep_probing(route)) for route in self._routes]

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        for route in self._routes:
            route.network.close()
            if route.probe:
                route.probe.close("shutting down")
        for link in list(self._links):
            link.close("shutting down")

    def status(self) -> list[dict[str, Any]]:
        """Each network, whether it answers and whether it is the one in use."""
        return [
            {"route": route.network.name, "up": self._answers(route), "used": route is self._in_use()}
            for route in self._routes
        ]

    def _in_use(self) -> Route | None:
        return self._used[0] if self._used and not self._used[1].closing else None

    def _answers(self, route: Route) -> bool:
        if len(self._routes) == 1:
            return self._in_use() is route
        if self._dial:
            return route.probe is not None and route.missed <= MISSED_MAX
        return asyncio.get_running_loop().time() - route.heard_at < HEARD_S

    # -- dialling ----------------------------------------------------------------------------------------------

    async def _keep_dialling(self) -> None:
        while True:
            if self._in_use() is None:
                for route in self._by_preference():
                    try:
                        await route.network.connect(partial(self._new_dialled, route))
                        break
                    except (OSError, TimeoutError) as error:
                        route.failed(str(error) or type(error).__name__)
            await asyncio.sleep(DIAL_INTERVAL_S)

    def _by_preference(self) -> list[Route]:
        return sorted(self._routes, key=lambda route: (not self._answers(route), route.suspect))

    def _new_dialled(self, route: Route) -> Link:
        return Link(partial(self._dialled, route), self._frame, self._down)

    def _dialled(self, route: Route, link: Link) -> None:
        self._used, self._used_since = (route, link), asyncio.get_running_loop().time()
        self._number += 1
        greeting = msgspec.msgpack.encode(Greeting(WIRE, VERSION, self._start, self._number))
        link.send(Kind.USE, 0, greeting)
        self._tasks.append(asyncio.get_running_loop().create_task(self._dial_control(route, link, greeting)))
        self._tasks = [task for task in self._tasks if not task.done()]

    async def _dial_control(self, route: Route, link: Link, greeting: bytes) -> None:
        """The second connection of a pair; both are in use from then on."""

        def up(control: Link) -> None:
            if link.closing or self._used is None or self._used[1] is not link:
                control.close("its other connection has ended")
                return
            link.control = control
            control.send(Kind.CONTROL, 0, greeting)
            self._on_up(link)

        try:
            await route.network.connect(lambda: Link(up, self._frame, lambda one: self._control_down(link, one)))
        except (OSError, TimeoutError):
            link.close("no second connection")

    def _control_down(self, link: Link, control: Link) -> None:
        if not link.closing and link.control is control:
            link.close(f"its other connection ended: {control.why_closed}")

    async def _keep_probing(self, route: Route) -> None:
        """Have a connection for probes."""
        while True:
            if route.probe is None:
                with contextlib.suppress(OSError, TimeoutError):
                    await route.network.connect(partial(self._new_probe, route))
            await asyncio.sleep(DIAL_INTERVAL_S)

    def _new_probe(self, route: Route) -> Link:
        def up(link: Link) -> None:
            route.probe, route.answered = link, route.sent

        def answered(_link: Link, kind: Kind, number: int, _payload: bytearray) -> None:
            if kind is Kind.PROBE:
                route.answered = max(route.answered, min(number, route.sent))

        def down(_link: Link) -> None:
            route.probe, route.steady = None, 0

        return Link(up, answered, down)

    async def _keep_choosing(self) -> None:
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            for route in self._routes:
                route.tick()
            used = self._in_use()
            if used is None or self._used is None:
                continue
            link = self._used[1]
            used.carried(link.acknowledged)
            others = [route for route in self._routes if route is not used and route.probe and route.missed <= 1]
            if used.missed >= MISSED_MAX and used.quiet >= MISSED_MAX and others:
                used.failed("silent")
                link.close("its network is silent")
            elif used is not self._routes[0] and self._routes[0].steady >= STEADY and not self._routes[0].suspect:
                link.close("the preferred network answers again")

    # -- answering ---------------------------------------------------------------------------------------------

    async def _keep_listening(self, route: Route) -> None:
        """A network whose address isn't here yet, its cable being out, holds up neither the others nor this node."""
        while True:
            try:
                await route.network.listen(partial(self._new_accepted, route))
                return
            except OSError as error:
                route.failed(f"can't listen: {error.strerror or error}")
            await asyncio.sleep(LISTEN_AGAIN_S)

    def _new_accepted(self, route: Route) -> Link:
        def up(link: Link) -> None:
            if route.network.expects and route.network.expects not in link.certified:
                link.close("the certificate of another machine")
                return
            self._links.append(link)
            used = (self._used[1], self._used[1].control) if self._used else ()
            idle = [one for one in self._links if one not in used]
            if len(self._links) > CONNECTIONS_MAX:
                idle[0].close("too many connections")

        def frame(link: Link, kind: Kind, stream: int, payload: bytearray) -> None:
            route.heard_at = asyncio.get_running_loop().time()
            if kind is Kind.PROBE:
                link.send(Kind.PROBE, stream)
            elif kind is Kind.USE:
                if self._greeted(link, payload):
                    link.send(Kind.USE, 0, msgspec.msgpack.encode(Greeting(WIRE, VERSION)))
                    self._used = (route, link)
                    self._join()
            elif kind is Kind.CONTROL:
                self._control = (bytes(payload), link)
                self._join()
            else:
                self._on_frame(link, kind, stream, payload)

        return Link(up, frame, self._down)

    def _join(self) -> None:
        """The two connections of a pair may come in either order."""
        if self._used is None or self._control is None:
            return
        link, (greeting, control) = self._used[1], self._control
        if link.control is None and greeting == self._greeting and not control.closing and not link.closing:
            link.control = control
            self._on_up(link)

    def _greeted(self, link: Link, payload: bytearray) -> bool:
        try:
            greeting = msgspec.msgpack.decode(payload, type=Greeting)
        except msgspec.DecodeError:
            link.close("a greeting that isn't ours")
            return False
        if greeting.wire[0] != WIRE[0]:
            log.error("peer.other_protocol", theirs=greeting.wire, ours=WIRE, version=greeting.version)
            link.close("it speaks another version of the protocol")
            return False
        start, number = self._greeted_by
        if greeting.start == start and greeting.number < number:
            link.close("it was made before the one in use")  # and was late, on a network that failed meanwhile
            return False
        self._greeted_by, self._greeting = (greeting.start, greeting.number), bytes(payload)
        self.peer_version = greeting.version
        link.plain_frames = greeting.wire >= PLAIN_FRAMES
        return True

    # -- both --------------------------------------------------------------------------------------------------

    def _frame(self, link: Link, kind: Kind, stream: int, payload: bytearray) -> None:
        if kind is Kind.USE:
            self._greeted(link, payload)
        else:
            self._on_frame(link, kind, stream, payload)

    def _down(self, link: Link) -> None:
        if link in self._links:
            self._links.remove(link)
        if link.control is not None:
            link.control.close("its other connection has ended")
        if self._control and self._control[1] is link:
            self._control = None
        if self._used and self._used[1].control is link:
            self._used[1].close(f"its other connection ended: {link.why_closed}")
            return
        if self._used and self._used[1] is link:
            route = self._used[0]
            self._used = None
            if self._dial and asyncio.get_running_loop().time() - self._used_since < SHORT_S:
                route.failed(f"ended soon: {link.why_closed}")
        self._on_down(link)
