"""The machine's watchdog: armed while this node serves, fed when its right to serve was renewed.

Should this process hang or vanish while the address is here, the device resets the machine; a proper end disarms it.
Source: Linux Documentation/watchdog/watchdog-api.rst.
"""

import contextlib
import fcntl
import os
import struct
from typing import Final

import structlog

log = structlog.get_logger()

WDIOC_SETTIMEOUT: Final = 0xC0045706
TIMEOUT_S_MIN: Final = 10


class Watchdog:
    def __init__(self, path: str, lease_ttl_s: float) -> None:
        """`path` "": there is none."""
        self._path, self._timeout_s = path, max(TIMEOUT_S_MIN, round(2 * lease_ttl_s))
        self._device: int | None = None
        self._inherited = bool(path)  # an agent before this one may have died with it armed
        self._said = False

    def feed(self) -> None:
        """Arms it at the first call. A device that fails is said once, and tried again at the next call."""
        if not self._path:
            return
        try:
            os.write(self._open(), b"\0")
            self._said = False
        except OSError as error:
            self._failed(error)

    def disarm(self) -> None:
        """For when the addresses are gone. Also what an agent before this one left armed."""
        if self._device is None and not self._inherited:
            return
        try:
            os.write(self._open(), b"V")  # "magic close": without it, closing doesn't stop the clock
            log.info("watchdog.disarmed")
        except OSError as error:
            self._failed(error)
        self._inherited = False
        self._close()

    def _open(self) -> int:
        if self._device is not None:
            return self._device
        self._device = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        self._inherited = False
        with contextlib.suppress(OSError):  # not every device lets it be set
            fcntl.ioctl(self._device, WDIOC_SETTIMEOUT, struct.pack("i", self._timeout_s))
        log.info("watchdog.armed", device=self._path)
        return self._device

    def _close(self) -> None:
        if self._device is not None:
            os.close(self._device)
            self._device = None

    def _failed(self, error: OSError) -> None:
        if not self._said:
            log.error("watchdog.unavailable", device=self._path, error=error.strerror)
        self._said = True
        self._close()
