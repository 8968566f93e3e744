"""`tools/bench floor`: the processor time that the kernel, TLS and the digest alone take for an object on this machine.

Nothing of Tandem is in it: plain sockets, files and `ssl`, one step after the other in one thread. What a node that
keeps two copies can't do without is the sum of them.
"""

import contextlib
import os
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import click
import xxhash

from tools.cli.certificates import Authority

SIZES: Final = {"CT": 526_000, "MR": 135_000}
RECEIVED_BYTES: Final = 64 << 10  # with one call
LOG_BYTES: Final = 64 << 20
FILES: Final = ("ca.crt", "node.crt", "node.key")


def _cpu_ms(count: int, step: Callable[[], object]) -> float:
    """Of this process, for each of `count` times."""
    step()
    begin = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - begin) * 1000 / count


@contextlib.contextmanager
def _other(work: Callable[[socket.socket], None]) -> Iterator[socket.socket]:
    """A connection over loopback to a process that does `work` at its other end."""
    listener = socket.create_server(("127.0.0.1", 0))
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            work(socket.create_connection(listener.getsockname()))
        os._exit(0)
    here, _ = listener.accept()
    try:
        yield here
    finally:
        here.close()
        listener.close()
        os.waitpid(child, 0)


def _give(there: socket.socket, data: bytes) -> None:
    while True:
        there.sendall(data)


def _take(there: socket.socket) -> None:
    buffer = bytearray(1 << 20)
    while there.recv_into(buffer):
        pass


def _read(here: socket.socket, size: int, into: bytearray) -> None:
    left, view = size, memoryview(into)
    while left:
        left -= here.recv_into(view, min(left, RECEIVED_BYTES))


class _Tls:
    def __init__(self, folder: Path) -> None:
        authority = Authority(folder)
        authority.make("bench")
        authority.issue(folder / "node", "node", ["127.0.0.1"])
        self._files = folder / "node"

    def wrap(self, plain: socket.socket, *, server: bool) -> ssl.SSLSocket:
        """The connection with TLS, as between two nodes."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        ca, certificate, key = (str(self._files / name) for name in FILES)
        context.load_verify_locations(ca)
        context.load_cert_chain(certificate, key)
        return context.wrap_socket(plain, server_side=server)


def _to_log(fd: int, data: bytes) -> Callable[[], None]:
    at = [0]

    def step() -> None:
        at[0] = (at[0] + len(data)) % (LOG_BYTES - len(data)) & ~7
        os.pwrite(fd, data, at[0])
        os.fdatasync(fd)

    return step


def _to_file(folder: Path, data: bytes) -> Callable[[], None]:
    number = [0]
    (folder / "spool").mkdir(exist_ok=True)
    (folder / "tree").mkdir(exist_ok=True)

    def step() -> None:
        number[0] += 1
        spool = folder / "spool" / str(number[0])
        fd = os.open(spool, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        os.write(fd, data)
        os.close(fd)
        spool.rename(folder / "tree" / f"{len(data)}-{number[0]}")

    return step


def _steps(folder: Path, tls: _Tls, log: int, data: bytes, count: int) -> Iterator[tuple[str, float]]:
    into = bytearray(RECEIVED_BYTES)
    with _other(partial(_give, data=data)) as here:
        yield "received", _cpu_ms(count, partial(_read, here, len(data), into))
    yield "digest", _cpu_ms(count, partial(xxhash.xxh3_128_digest, data))
    with _other(lambda there: _take(tls.wrap(there, server=False))) as plain:
        sealed = tls.wrap(plain, server=True)
        yield "sent to the standby, TLS", _cpu_ms(count, partial(sealed.sendall, data))
        sealed.close()
    with _other(lambda there: _give(tls.wrap(there, server=False), data)) as plain:
        sealed = tls.wrap(plain, server=True)
        yield "received by the standby, TLS", _cpu_ms(count, partial(_read, sealed, len(data), into))
        sealed.close()
    yield "log, one sync", _cpu_ms(count, _to_log(log, data))
    yield "file", _cpu_ms(count, _to_file(folder, data))


def measure(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """CPU ms an object of each kind, by step."""
    tls = _Tls(folder / "authority")
    log = os.open(folder / "log", os.O_RDWR | os.O_CREAT, 0o640)
    os.write(log, bytes(LOG_BYTES))
    found: dict[str, dict[str, float]] = {}
    for kind, size in SIZES.items():
        steps = found[kind] = dict(_steps(folder, tls, log, os.urandom(size), count))
        both = steps["digest"] + steps["log, one sync"] + steps["file"]
        steps["primary in all"] = both + steps["received"] + steps["sent to the standby, TLS"]
        steps["standby in all"] = both + steps["received by the standby, TLS"]
    os.close(log)
    return found


@click.command()
@click.option("--count", default=400, show_default=True, help="Objects of each size and step.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where to write; default: a tmpfs.")
def floor(count: int, folder: Path | None) -> None:
    """Processor time an object that no program for two copies can do without, on this machine."""
    base = Path(tempfile.mkdtemp(prefix="tandem-bench-", dir=folder or "/dev/shm"))
    try:
        found = measure(base, count)
    finally:
        shutil.rmtree(base)
    click.echo("CPU ms an object" + "".join(f"{kind:>12}" for kind in found))
    for step in next(iter(found.values())):
        click.echo(f"  {step:<30}" + "".join(f"{steps[step]:>8.2f}    " for steps in found.values()))
