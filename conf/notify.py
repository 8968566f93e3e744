"""Tells systemd that a service is ready and alive (`Type=notify`, `WatchdogSec=`). Source: sd_notify(3)."""

import asyncio
import contextlib
import os
import socket


def notify(message: str) -> bool:
    """Send READY=1, WATCHDOG=1, STATUS=... or STOPPING=1; returns whether anybody is listening."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
        contextlib.suppress(OSError),
    ):
        channel.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)
        return True
    return False


async def keep_alive() -> None:
    """Feed systemd's watchdog from the event loop: a loop that hangs is ended and started again."""
    interval_us = int(os.environ.get("WATCHDOG_USEC", "0"))
    while interval_us:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_us / 3e6)
