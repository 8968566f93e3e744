"""TLS by which the machines of a cluster know each other: each side shows a certificate of the cluster's authority.

Certificates are read anew when their files have changed, for the connections that are made from then on: renewing them
interrupts nothing.
"""

import ssl
from pathlib import Path
from typing import Any

import structlog

from conf.settings import TlsSettings

log = structlog.get_logger()


class CertificatesBad(OSError):
    """They can't be read, don't belong together, or aren't certificates. One line."""


class MutualTls:
    def __init__(self, files: TlsSettings) -> None:
        """Raises CertificatesBad."""
        self._files = files
        self._read = self._ages()
        self._server, self._client = self._load()

    def accepting(self) -> ssl.SSLContext:
        """For a server. It may be kept: each handshake takes the certificates that are there then."""

        def take_newest(connection: Any, _name: str | None, _context: ssl.SSLContext) -> None:
            self._renew()
            connection.context = self._server

        door = self._server_context()
        door.sni_callback = take_newest
        return door

    def dialling(self) -> ssl.SSLContext:
        """For one connection, or a few."""
        self._renew()
        return self._client

    def _paths(self) -> tuple[Path, ...]:
        return self._files.ca_file, self._files.certificate, self._files.key

    def _ages(self) -> list[int]:
        try:
            return [path.stat().st_mtime_ns for path in self._paths()]
        except OSError:
            return []

    def _renew(self) -> None:
        ages = self._ages()
        if ages == self._read:
            return
        try:
            self._server, self._client = self._load()
            self._read = ages
            log.info("tls.renewed")
        except CertificatesBad as error:  # half written, perhaps: the ones before are still good
            log.error("tls.not_renewed", error=str(error))

    def _load(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        return self._server_context(), self._filled(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def _server_context(self) -> ssl.SSLContext:
        context = self._filled(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _filled(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # etcd 3.4 has no better
        try:
            context.load_cert_chain(self._files.certificate, self._files.key)
            context.load_verify_locations(self._files.ca_file)
        except (OSError, ssl.SSLError) as error:
            named = ", ".join(str(path) for path in self._paths())
            raise CertificatesBad(f"certificates ({named}): {error}") from error
        return context
