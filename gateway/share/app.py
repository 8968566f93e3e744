"""The process that serves the share: a mounted file system whose changes the gateway puts in the log."""

import asyncio
import contextlib
import signal
import time
from pathlib import Path
from typing import Final

import pyfuse3
import pyfuse3.asyncio
import structlog

from conf.settings import Settings
from gateway.share.fuse import Operations
from storage.files.local import LocalFiles
from storage.files.namespace import Namespace
from storage.files.remote import RemoteLog
from storage.files.share import Share
from storage.state.catalogue import TABLES
from storage.state.kv import LmdbReader
from storage.workers import Workers

log = structlog.get_logger()

DISK_THREADS: Final = 8
OPTIONS: Final = frozenset({"default_permissions", "allow_other", "fsname=tandem", "subtype=tandem"})


def run(settings: Settings, mountpoint: Path) -> str:
    """Serve until it is unmounted, or ended by a signal: ""; or until the gateway is gone: why. Raises OSError."""
    return asyncio.run(_main(settings, mountpoint))


async def _main(settings: Settings, mountpoint: Path) -> str:
    remote, begun = await RemoteLog.begin(settings.files_socket)
    reader = LmdbReader(Path(begun.catalogue), TABLES)
    disk = Workers(DISK_THREADS, "share")
    local = LocalFiles([Path(volume) for volume in begun.volumes], begun.reserve_bytes)
    share = Share(Namespace(reader, remote.propose), local, disk, time.time_ns)
    listening = asyncio.create_task(remote.run())
    try:
        await share.begin()
        pyfuse3.asyncio.enable()
        try:
            pyfuse3.init(Operations(share), str(mountpoint), set(OPTIONS))
        except RuntimeError as error:
            raise OSError(0, f"{mountpoint} can't be mounted: {error}") from error
        return await _serve(remote)
    finally:
        listening.cancel()
        disk.stop()
        reader.close()


async def _serve(remote: RemoteLog) -> str:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    serving = asyncio.create_task(pyfuse3.main())
    stopping = asyncio.create_task(stop.wait())
    log.info("share.mounted")
    try:
        await asyncio.wait((serving, stopping, remote.ended), return_when=asyncio.FIRST_COMPLETED)
    finally:
        serving.cancel()
        stopping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        pyfuse3.close(unmount=True)
        log.info("share.unmounted")
    return remote.ended.result() if remote.ended.done() else ""
