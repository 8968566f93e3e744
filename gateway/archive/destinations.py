"""Whom we send to, as the settings name them."""

import asyncio
import ssl
from dataclasses import dataclass

from conf.settings import Destination as DestinationSettings
from gateway.archive.live import Live


@dataclass(frozen=True)
class Destination:
    """Another application entity."""

    aet: str
    settings: DestinationSettings

    @property
    def timeout_s(self) -> float:
        return self.settings.timeout_s

    async def tls(self) -> ssl.SSLContext | None:
        """None for a plain connection. Certificates are read anew each time, in a thread: that takes some 20 ms. Raises
        OSError."""
        return await asyncio.to_thread(self._context) if self.settings.tls else None

    def _context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.settings.ca_file)
        if self.settings.certificate:
            context.load_cert_chain(self.settings.certificate, self.settings.key)
        return context


class Destinations:
    def __init__(self, live: Live) -> None:
        self._live = live

    def get(self, aet: str) -> Destination | None:
        """A destination by its AE title."""
        known = self._live.dicom.destinations.get(aet)
        return Destination(aet, known) if known else None
