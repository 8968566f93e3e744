"""The process that serves the share: a mounted file system whose changes the gateway puts in the log."""

import asyncio
import contextlib
import errno
import os
import resource
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import pyfuse3
import pyfuse3.asyncio
import structlog
import uvloop

from conf.mounts import files_at, mount_at
from conf.settings import Settings
from gateway.share.fuse import Operations
from storage.files.catching_up import CatchingUp
from storage.files.local import LocalFiles
from storage.files.namespace import Namespace
from storage.files.peer import Pair
from storage.files.remote import NoGateway, RemoteLog
from storage.files.share import Share
from storage.files.wire import VolumesAre
from storage.state.catalogue import TABLES
from storage.state.kv import LmdbReader
from storage.workers import Workers

log = structlog.get_logger()

DISK_THREADS: Final = 8
OPTIONS: Final = frozenset({"default_permissions", "allow_other", "fsname=tandem", "subtype=tandem"})
CONNECTIONS: Final = Path("/sys/fs/fuse/connections")
END_S: Final = 30.0  # for what is under way when it ends
AGAIN_S: Final = 0.2  # between two tries to begin
LOOK_S: Final = 0.5  # how old a look at the room of the catalogue's disk may be


def run(settings: Settings, mountpoint: Path) -> str:
    """Serve until it is unmounted, or ended by a signal: ""; or until the gateway is gone: why. In a pair it goes on
    then, as what this node is by then: the primary's may be read and written, the standby's read. Raises OSError."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two for each file that is open
    return uvloop.run(_main(settings, Path(os.path.abspath(mountpoint))))


async def _main(settings: Settings, mountpoint: Path) -> str:
    said = ""
    while True:
        try:
            why = await _mounted(settings, mountpoint)
        except NoGateway as error:
            if settings.cluster is None:
                raise
            why = str(error.strerror)
        if not why or settings.cluster is None:
            return why
        if why != said:
            log.info("share.again", why=why)
        said = why
        await asyncio.sleep(AGAIN_S)


class Room:
    """Of the disks of catalogue and log."""

    def __init__(self, folders: Sequence[str], reserve_bytes: int) -> None:
        self._folders, self._reserve_bytes = folders, reserve_bytes
        self._full, self._looked_at = False, float("-inf")

    def is_full(self) -> bool:
        now = time.monotonic()
        if now - self._looked_at > LOOK_S:
            found = [os.statvfs(folder) for folder in self._folders]
            self._full = any(status.f_bavail * status.f_frsize < self._reserve_bytes for status in found)
            self._looked_at = now
        return self._full


async def _mounted(settings: Settings, mountpoint: Path) -> str:
    remote, begun = await RemoteLog.begin(settings.files_socket)
    reader = LmdbReader(Path(begun.catalogue), TABLES)
    disk = Workers(DISK_THREADS, "share")
    volumes, draining = ([Path(folder) for folder in folders] for folders in (begun.volumes, begun.draining))
    local = LocalFiles(volumes, begun.reserve_bytes, draining, complete=begun.complete)
    room = Room((begun.catalogue, begun.log), begun.state_reserve_bytes)
    share = Share(
        Namespace(reader, remote.propose),
        local,
        disk,
        time.time_ns,
        room.is_full,
        hang_s=settings.storage.hang_s,
        pair=Pair(begun.node, begun.peer),
        peer=remote.peer if begun.peer else None,
    )
    remote.ended.add_done_callback(lambda _: setattr(share, "over", True))
    remote.on_volumes = lambda now: _use(local, disk, now)
    helpers = [asyncio.create_task(remote.run()), asyncio.create_task(_reinforce(disk, settings.storage.hang_s))]
    try:
        if not local.complete:
            log.warning("share.volumes_missing", note="files that lie there can't be read")
        if begun.writes:
            await share.begin()
            share.own_top(os.geteuid(), os.getegid())
        else:
            share.begin_reading()
        if begun.writes:
            catching_up = CatchingUp(share)
            remote.on_move = lambda move: catching_up.move(move.node, move.numbers)
            helpers.append(asyncio.create_task(catching_up.run()))
        await _clear(mountpoint)
        pyfuse3.asyncio.enable()
        options = OPTIONS if begun.writes else OPTIONS | {"ro"}
        try:
            pyfuse3.init(Operations(share), str(mountpoint), set(options))
        except RuntimeError as error:
            raise OSError(0, f"{mountpoint} can't be mounted: {error}") from error
        await _serve(remote, mountpoint)
        if begun.writes and not remote.ended.done():  # what was answered and not waited for is still on its way
            async with asyncio.timeout(END_S):
                await share.end()
        return remote.ended.result() if remote.ended.done() else ""
    except TimeoutError:  # an OSError, too
        raise OSError(0, "not all that was changed last is in the log: the gateway doesn't answer") from None
    except OSError:
        if remote.ended.done():
            return remote.ended.result()  # it isn't the primary any more, perhaps
        raise
    finally:
        for helper in helpers:
            helper.cancel()
        await asyncio.wait(helpers)
        disk.stop()
        local.close()
        reader.close()


def _use(local: LocalFiles, disk: Workers, now: VolumesAre) -> None:
    volumes, draining, absent = (
        [Path(folder) for folder in folders] for folders in (now.volumes, now.draining, now.absent)
    )
    log.info("share.volumes", count=len(volumes), draining=len(draining), absent=len(absent))
    using = disk.run(partial(local.use, volumes, draining, absent, complete=now.complete))
    using.add_done_callback(lambda done: done.cancelled() or done.exception())


async def _reinforce(disk: Workers, hang_s: float) -> None:
    """A disk that hangs holds threads, and nothing else."""
    while True:
        await asyncio.sleep(LOOK_S)
        disk.reinforce(hang_s)


async def _serve(remote: RemoteLog, mountpoint: Path) -> None:
    """Until it is unmounted, a signal comes, or the gateway is gone. Raises OSError if it can't be taken away."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    serving = asyncio.create_task(pyfuse3.main())
    stopping = asyncio.create_task(stop.wait())
    log.info("share.mounted")
    await asyncio.wait((serving, stopping, remote.ended), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not serving.done():
        await _unmount(mountpoint)
        await asyncio.wait((serving,), timeout=END_S)
    if not serving.done():  # it is cut off when this process ends
        raise OSError(errno.EBUSY, "something is under way that doesn't end")
    pyfuse3.close(unmount=False)
    log.info("share.unmounted")


async def _clear(mountpoint: Path) -> None:
    """What an earlier process has left there when it was killed."""
    while files_at(mountpoint):
        if not await _fusermount("-uz", mountpoint):
            return


async def _unmount(mountpoint: Path) -> None:
    """Take it away from who uses it, too: nobody may hang."""
    mount = mount_at(mountpoint)
    if await _fusermount("-u", mountpoint):
        return
    await _fusermount("-uz", mountpoint)
    if mount:
        with contextlib.suppress(OSError):
            (CONNECTIONS / mount.device / "abort").write_text("1")


async def _fusermount(how: str, mountpoint: Path) -> bool:
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec("fusermount3", how, str(mountpoint), stdout=quiet, stderr=quiet)
    return await process.wait() == 0
