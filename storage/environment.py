"""What a store stands on: clock, threads, disks, database and network. The simulation gives it others."""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import structlog

from conf.settings import ClusterSettings, Settings
from conf.tls import MutualTls
from storage.control import boottime
from storage.files.copies import CopyStore
from storage.files.local import LocalFiles
from storage.log.folder import Folder, LocalFolder, LogDamaged
from storage.log.log import Log
from storage.log.records import PAYLOAD_BYTES_MAX
from storage.log.salvage import lineage_of, set_aside
from storage.objects.local_volume import LocalVolume
from storage.objects.locks import lock_state
from storage.objects.view import Showing, View
from storage.objects.volumes import OpenVolume
from storage.replication.network import Network, Tcp
from storage.state.catalogue import Batch, Catalogue
from storage.state.kv import TAKEN_FOLDER, CatalogueDamaged
from storage.state.logged import logged
from storage.state.soundness import is_sound, is_unclean, opened
from storage.workers import Workers, WorkersFactory

SEGMENTS_MIN, SEGMENTS = 3, 16  # of the log, at most while nothing holds up its trimming
SPARES: Final = 4
SEGMENT_BYTES_MIN: Final = PAYLOAD_BYTES_MAX + (1 << 20)  # the longest entry fits
LOG_BYTES_MIN: Final = 32 << 20
LOG_SHARE: Final = 8  # of its disk: one part in so many
NEW_FOLDER: Final = "catalogue.new"  # beside the catalogue, while it is made anew

log = structlog.get_logger()


class LogAway(LogDamaged):
    """There is nothing where the log was."""


class OpenCopies(Protocol):
    def __call__(
        self, volumes: Sequence[Path], reserve_bytes: int, draining: Sequence[Path], *, complete: bool
    ) -> CopyStore:
        """See `LocalFiles`."""
        ...


@dataclass(frozen=True)
class Surroundings:
    networks: tuple[Network, ...]  # between the nodes, the preferred one first
    view: Callable[[list[Path]], Showing]  # given the readable trees of the volumes
    open_catalogue: Callable[[], Catalogue]
    open_log: Callable[[Catalogue], Log]
    clock: Callable[[], float] = boottime
    workers: WorkersFactory = Workers
    open_volume: OpenVolume = LocalVolume
    open_copies: OpenCopies = LocalFiles
    lock: Callable[[], ExitStack | None] = lambda: None  # on the folders of catalogue and log; raises InUse
    free_state_bytes: Callable[[], int] = lambda: 1 << 40  # where catalogue and log are; the smaller one


def real(settings: Settings) -> Surroundings:
    """This machine."""
    cluster, state = settings.cluster, settings.storage.state

    def view(archives: list[Path]) -> Showing:
        made = View(state / "share" / "archive")
        made.rebuild(archives)
        return made

    return Surroundings(
        networks=_networks(cluster) if cluster else (),
        view=view,
        open_catalogue=lambda: open_or_set_aside(settings),
        open_log=lambda catalogue: open_log(
            LocalFolder(settings.storage.log_folder), catalogue, log_room(settings), alone=cluster is None
        ),
        lock=lambda: _locks(settings),
        free_state_bytes=lambda: min(free_bytes(state), free_bytes(settings.storage.log_folder)),
    )


def _locks(settings: Settings) -> ExitStack:
    with ExitStack() as locks:
        for folder in (settings.storage.state, *((settings.storage.log,) if settings.storage.log else ())):
            locks.callback(lock_state(folder).close)
        return locks.pop_all()


def log_room(settings: Settings) -> int:
    """Room for the log: what the settings say, and less on a small disk. Raises OSError."""
    folder = settings.storage.log_folder
    folder.mkdir(parents=True, exist_ok=True)
    status = os.statvfs(folder)
    return max(LOG_BYTES_MIN, min(settings.storage.log_bytes, status.f_blocks * status.f_frsize // LOG_SHARE))


def open_log(folder: Folder, catalogue: Catalogue, log_bytes: int, *, alone: bool = False) -> Log:
    """This node's log, which ends where the catalogue does or behind it. One that isn't what was written, or isn't
    there any more, is never guessed at: in a pair it is set aside, and this node begins a log anew as a stranger to the
    in-sync set, that has to follow the other node up to date. For a folder with nothing in it the node waits: it may be
    mounted later. Raises LogAway, LogDamaged alone, OSError.
    """
    try:
        return _open_log(folder, catalogue, log_bytes)
    except LogDamaged as error:
        if isinstance(error, LogAway):
            raise LogAway(f"the log: {error} `tandem rebuild-index` begins one anew") from error
        if alone:
            raise LogDamaged(
                f"the log: {error}; `tandem rebuild-index` makes catalogue and log anew, from the files and from what "
                "can be read of this log"
            ) from error
        log.critical("log.damaged", error=str(error))
    catalogue.write(Batch(meta={"whole": False, "store_id": "", "log": ""}))
    return _open_log(folder, catalogue, log_bytes)


def _open_log(folder: Folder, catalogue: Catalogue, log_bytes: int) -> Log:
    """Raises LogDamaged, OSError."""
    name = str(catalogue.meta("log", ""))
    if not name:
        return _begin_log(folder, catalogue, log_bytes)
    last = catalogue.epochs.last[1]
    kept = _log(folder, log_bytes)
    try:
        if kept.lineage != name:
            raise (LogDamaged if kept.lineage else LogAway)(
                "its segments aren't where they were; is `[storage] log` another folder now, or its disk away?"
            )
        if kept.last[1] < int(catalogue.meta("checkpoint", 0)):
            # A state was taken from the other node; all that the log has is older.
            kept.begin(name, catalogue.epochs.pairs)
        if kept.first > last + 1:
            raise LogDamaged(f"it begins with entry {kept.first}, and the catalogue ends with {last}")
        for record in kept.records(last + 1):  # what will be replayed can be read
            logged(record)
    except BaseException:
        kept.close()
        raise
    return kept


def _log(folder: Folder, log_bytes: int) -> Log:
    """Raises LogDamaged, OSError."""
    size = max(log_bytes // SEGMENTS, min(SEGMENT_BYTES_MIN, log_bytes // SEGMENTS_MIN))
    return Log(folder, size, min(SPARES, log_bytes // size // 2), log_bytes // size)


def _begin_log(folder: Folder, catalogue: Catalogue, log_bytes: int) -> Log:
    """Raises OSError."""
    is_taken = lineage_of(folder) == catalogue.meta("log_taken", "")  # all that it says is in the catalogue
    if not is_taken and (prefix := set_aside(folder)):
        log.warning("log.set_aside", prefix=prefix)
    try:
        kept = _log(folder, log_bytes)
    except LogDamaged:  # a head that can't be read
        set_aside(folder)
        kept = _log(folder, log_bytes)
    name = str(uuid.uuid4())
    kept.begin(name, catalogue.epochs.pairs)
    catalogue.write(Batch(meta={"log": name}))
    return kept


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _networks(cluster: ClusterSettings) -> tuple[Network, ...]:
    tls = MutualTls(cluster.tls) if cluster.tls else None
    return tuple(
        Tcp(route.address, route.peer_address, cluster.replication_port, tls, cluster.peer) for route in cluster.routes
    )


def open_or_set_aside(settings: Settings) -> Catalogue:
    """This node's catalogue. A damaged one is never guessed at: in a pair it is set aside and this node begins anew, as
    a stranger to the in-sync set, with the other node's log and the files that lie here. Raises CatalogueDamaged alone,
    and OSError.
    """
    path, size = settings.storage.state / "catalogue", settings.storage.map_size_bytes
    shutil.rmtree(path.with_name(TAKEN_FOLDER), ignore_errors=True)  # its taking was broken off
    if not path.exists() and path.with_name(NEW_FOLDER).exists():
        raise CatalogueDamaged(f"{path}: `tandem rebuild-index` was interrupted; run it again")
    try:
        if is_unclean(path) and not is_sound(path):
            raise CatalogueDamaged(f"{path}: pages of it can't be read")
        opened(path)
        return Catalogue.open(path, size)
    except CatalogueDamaged as error:
        if settings.cluster is None:
            raise CatalogueDamaged(f"{error}; `tandem rebuild-index` makes it anew from the files") from error
        aside = path.with_name(f"catalogue.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
        log.critical("catalogue.damaged", error=str(error), set_aside=str(aside))
        path.rename(aside)
    opened(path)
    fresh = Catalogue.open(path, size)
    fresh.write(Batch(meta={"whole": False}))
    return fresh
