"""How the two gateways reach each other; the simulation has another way."""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from conf.tls import MutualTls

DIAL_TIMEOUT_S: Final = 1.0
HANDSHAKE_TIMEOUT_S: Final = 10.0

NewProtocol = Callable[[], asyncio.BaseProtocol]


class Network(Protocol):
    """One network between the nodes."""

    @property
    def name(self) -> str:
        """For people: the addresses at its ends."""
        ...

    @property
    def expects(self) -> str:
        """What the certificate of whoever connects must name, "" where none is asked for."""
        ...

    async def listen(self, accepted: NewProtocol) -> None:
        """Raises OSError."""
        ...

    async def connect(self, connected: NewProtocol) -> None:
        """Raises OSError or TimeoutError."""
        ...

    def close(self) -> None: ...


class Tcp:
    def __init__(
        self, own_address: str, peer_address: str, port: int, tls: MutualTls | None = None, peer_name: str = ""
    ) -> None:
        """With `tls` both sides must have a certificate of the cluster, the other one that of `peer_name`."""
        self._own, self._peer, self._port = own_address, peer_address, port
        self._tls, self._peer_name = tls, peer_name
        self._server: asyncio.Server | None = None

    @property
    def name(self) -> str:
        return f"{self._own} - {self._peer}"

    @property
    def expects(self) -> str:
        return self._peer_name if self._tls else ""

    async def listen(self, accepted: NewProtocol) -> None:
        loop = asyncio.get_running_loop()
        context = self._tls.accepting() if self._tls else None
        wait_s = HANDSHAKE_TIMEOUT_S if context else None
        self._server = await loop.create_server(
            accepted, self._own, self._port, ssl=context, ssl_handshake_timeout=wait_s, reuse_address=True
        )

    async def connect(self, connected: NewProtocol) -> None:
        loop = asyncio.get_running_loop()
        context = self._tls.dialling() if self._tls else None
        name = self._peer_name if context else None
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            await loop.create_connection(
                connected, self._peer, self._port, ssl=context, server_hostname=name, local_addr=(self._own, 0)
            )

    def close(self) -> None:
        if self._server:
            self._server.close()
