"""Whom we send to, as the settings name them."""

import ssl
from dataclasses import dataclass

from conf.settings import Destination as DestinationSettings
from conf.settings import DicomSettings


@dataclass(frozen=True)
class Destination:
    """Another application entity."""

    aet: str
    settings: DestinationSettings

    @property
    def timeout_s(self) -> float:
        return self.settings.timeout_s

    def tls(self) -> ssl.SSLContext | None:
        """None for a plain connection. Raises OSError."""
        if not self.settings.tls:
            return None
        context = ssl.create_default_context(cafile=self.settings.ca_file)
        if self.settings.certificate:
            context.load_cert_chain(self.settings.certificate, self.settings.key)
        return context


class Destinations:
    def __init__(self, settings: DicomSettings) -> None:
        self._settings = settings

    def get(self, aet: str) -> Destination | None:
        """A destination by its AE title."""
        known = self._settings.destinations.get(aet)
        return Destination(aet, known) if known else None
