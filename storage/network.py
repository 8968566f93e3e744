"""How the two gateways reach each other; the simulation has another way."""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

DIAL_TIMEOUT_S: Final = 1.0

NewProtocol = Callable[[], asyncio.BaseProtocol]


class Network(Protocol):
    async def listen(self, accepted: NewProtocol) -> None: ...
    async def connect(self, connected: NewProtocol) -> None:
        """Raises OSError or TimeoutError."""
        ...

    def close(self) -> None: ...


class Tcp:
    def __init__(self, own_address: str, peer_address: str, port: int) -> None:
        self._own, self._peer, self._port = own_address, peer_address, port
        self._server: asyncio.Server | None = None

    async def listen(self, accepted: NewProtocol) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(accepted, self._own, self._port, reuse_address=True)

    async def connect(self, connected: NewProtocol) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            await loop.create_connection(connected, self._peer, self._port, local_addr=(self._own, 0))

    def close(self) -> None:
        if self._server:
            self._server.close()
