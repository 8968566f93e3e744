"""What a store stands on: clock, threads, disks, database and network. The simulation gives it others."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from conf.settings import ClusterSettings, Settings
from conf.tls import MutualTls
from storage.control import boottime
from storage.objects.locks import Lock, lock_state
from storage.objects.view import Showing, View
from storage.objects.volume import LocalVolume
from storage.objects.volumes import OpenVolume
from storage.replication.network import Network, Tcp
from storage.state.catalogue import Batch, Catalogue
from storage.state.kv import CatalogueDamaged
from storage.state.soundness import is_sound, is_unclean, opened
from storage.workers import Workers, WorkersFactory

NEW_FOLDER: Final = "catalogue.new"  # beside the catalogue, while it is made anew

log = structlog.get_logger()


@dataclass(frozen=True)
class Surroundings:
    networks: tuple[Network, ...]  # between the nodes, the preferred one first
    view: Callable[[list[Path]], Showing]  # given the readable trees of the volumes
    open_catalogue: Callable[[], Catalogue]
    clock: Callable[[], float] = boottime
    workers: WorkersFactory = Workers
    open_volume: OpenVolume = LocalVolume
    lock: Callable[[], Lock | None] = lambda: None  # on the state folder; raises InUse
    free_state_bytes: Callable[[], int] = lambda: 1 << 40  # where the catalogue is


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
        lock=lambda: lock_state(state),
        free_state_bytes=lambda: free_bytes(state),
    )


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
