"""The gateway process: store, DICOM server and control socket on one event loop."""

import asyncio
import contextlib
import logging
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, Final

import structlog
import uvloop

from conf.notify import keep_alive, notify
from conf.settings import Settings
from conf.telling import place_of, set_level
from gateway.archive.indexing import Indexing
from gateway.archive.keeping import HeadKeeping
from gateway.dimse.reoffer import Offering
from gateway.dimse.server import DicomServer
from gateway.health import Health
from gateway.metrics import Meter
from storage.control_socket import ControlServer
from storage.engine import Engine
from storage.files_socket import FilesServer
from storage.replication.effects import InvariantBroken
from storage.store import Store

log = structlog.get_logger()

EXIT_FATAL = 70
SWITCH_INTERVAL_S = 0.0001


def run(settings: Settings, read_again: Callable[[], Settings]) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code. SIGHUP: the settings are read anew with `read_again`."""
    # A disk thread that was handed work gets the interpreter at once, and not only when the event loop next waits.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until we listen to it: by itself it would end us
    warnings.filterwarnings("ignore", module="pydicom")  # they name values, of patients too
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # as do its tracebacks; we say ourselves what went wrong
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a lack of descriptors must not look like a bad disk
    return uvloop.run(_main(settings, read_again))


async def _main(settings: Settings, read_again: Callable[[], Settings]) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server: DicomServer
    # Heard at the first await, when there is a server; until then it waits, and never ends us.
    loop.add_signal_handler(signal.SIGHUP, lambda: reload(settings, read_again, server))
    engine = Engine(settings)
    store = Store(engine)
    loop.set_exception_handler(lambda _loop, context: _unhandled(engine, context))
    control = ControlServer(engine, settings.control_socket)
    files = FilesServer(engine, settings.files_socket)
    meter = Meter()
    cluster = settings.cluster
    trusted = frozenset(link.peer_address for link in cluster.routes) if cluster else frozenset()
    server = DicomServer(store, settings.dicom, meter, trusted)
    await engine.start()
    await control.start()
    await files.start()
    await server.start()
    addresses = [link.address for link in cluster.routes] if cluster else ["127.0.0.1"]
    health = Health(store, settings.http, meter, server.queues, addresses)
    await health.start()
    server.spawn(Offering(store, settings).run())
    server.spawn(HeadKeeping(store, server.kept_heads).run())
    server.spawn(Indexing(store, settings.share, lambda: server.settings).run())
    engine.fatal.add_done_callback(lambda _: stop.set())
    server.spawn(keep_alive())
    notify("READY=1")
    await stop.wait()
    if engine.fatal.done():
        return EXIT_FATAL  # nothing is tidied up: recovery at the next start decides by what is on the disks
    notify("STOPPING=1")
    await health.stop()
    await server.stop()
    await files.stop()
    await control.stop()
    await engine.stop()
    log.info("gateway.stopped")
    return 0


# What holds only from the next start on, besides whole sections.
FIXED: Final = (
    *("bind", "port", "max_pdu_bytes", "retrieve_memory_bytes", "query_processes", "keep_heads"),
    *("standby_reads", "isolated_reads"),
)
FIXED_SECTIONS: Final = ("node", "storage", "cluster", "share", "http", "alerts")


def reload(settings: Settings, read_again: Callable[[], Settings], server: DicomServer) -> None:
    """Take over what can be taken over while running, and say what can't. Certificates are read anew for each
    connection anyway."""
    try:
        found = read_again()
    except Exception as error:  # wrong settings must not end what runs by the right ones
        log.error("settings.not_reloaded", why=getattr(error, "message", None) or str(error))
        return
    kept = {name: getattr(server.settings, name) for name in FIXED}
    waits = [f"dicom.{name}" for name, value in kept.items() if getattr(found.dicom, name) != value]
    waits += [name for name in FIXED_SECTIONS if getattr(found, name) != getattr(settings, name)]
    server.reload(found.dicom.model_copy(update=kept))
    set_level(found.log.level)
    log.info("settings.reloaded", restart_needed_for=waits)


def _unhandled(engine: Engine, context: dict[str, Any]) -> None:
    error = context.get("exception")
    log.error("loop.unhandled", message=context.get("message"), error=place_of(error) if error else "")
    if isinstance(error, InvariantBroken) and not engine.fatal.done():
        with contextlib.suppress(asyncio.InvalidStateError):
            engine.fatal.set_exception(error)
