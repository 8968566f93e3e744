"""`tools/bench share`: files over SMB, on the pair, on plain smbd (one copy, no failover) and on GlusterFS, replica 2.

Each operation is done on all in turn, by the same client (smbprotocol, in this process, whose own time is in all
figures). Signed, as SMB 3.1.1 is, and not encrypted: what is measured is the store.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from ha.reach.samba import passwords_of
from tools.cli.options import settings_of
from tools.lab.network import ADDRESSES, NODES, VIP, LabError, inside, namespace
from tools.lab.pair import FILES_SHARE, SMB_PORT, Lab, wait_for

USER: Final = "tandem-bench"
PASSWORD: Final = "bench"
PLAIN_PORT, GLUSTER_PORT = 4450, 4451
MB: Final = 1 << 20
SIZES: Final = {"135 KB": 135_000, "526 KB": 526_000}
LISTED: Final = 1000
STREAM_MB: Final = 64
WAIT_S: Final = 60.0
ANSWER_S: Final = 60.0


@dataclass
class Server:
    name: str
    host: str
    port: int
    share: str
    cache: dict[str, Any] = field(default_factory=dict)

    def connect(self) -> None:
        import smbclient

        smbclient.register_session(
            self.host,
            username=USER,
            password=PASSWORD,
            port=self.port,
            encrypt=False,
            connection_timeout=ANSWER_S,
            connection_cache=self.cache,
        )

    @property
    def given(self) -> dict[str, Any]:
        return {"port": self.port, "connection_cache": self.cache}

    def path(self, name: str) -> str:
        return rf"\\{self.host}\{self.share}\{name}"

    def write(self, name: str, data: bytes, *, flush: bool = False) -> None:
        import smbclient

        with smbclient.open_file(self.path(name), mode="wb", buffering=0, **self.given) as file:
            for at in range(0, len(data), MB):
                file.write(data[at : at + MB])
            if flush:
                file.fd.flush()

    def read(self, name: str) -> None:
        import smbclient

        with smbclient.open_file(self.path(name), mode="rb", buffering=0, **self.given) as file:
            while file.read(MB):
                pass

    def do(self, what: str, *names: str) -> None:
        import smbclient

        result = getattr(smbclient, what)(*(self.path(name) for name in names), **self.given)
        if what == "scandir":
            list(result)


Operation = Callable[[Server, int], None]


def _stored(server: Server, number: int) -> None:
    """As a PACS stores an image."""
    server.write(rf"bench\~{number}", _bytes(SIZES["135 KB"]), flush=True)
    server.do("rename", rf"bench\~{number}", rf"bench\image{number}.dcm")


def _bytes(length: int) -> bytes:
    return os.urandom(64) * (length // 64 + 1)


def operations() -> dict[str, tuple[Operation, float]]:
    """By name: what is done for a number, and how many MB it moves (0: its time counts)."""
    small = {
        f"create, write, close {label}": (
            lambda server, number, label=label: server.write(rf"bench\{label}-{number}", _bytes(SIZES[label])),
            0.0,
        )
        for label in SIZES
    }
    reads = {
        f"read {label}": (lambda server, number, label=label: server.read(rf"bench\{label}-{number}"), 0.0)
        for label in SIZES
    }
    return {
        "image stored 135 KB": (_stored, 0.0),
        **small,
        **reads,
        "create": (lambda server, number: server.write(rf"bench\empty{number}", b""), 0.0),
        "stat": (lambda server, number: server.do("stat", rf"bench\empty{number}"), 0.0),
        "rename": (
            lambda server, number: server.do("rename", rf"bench\empty{number}", rf"bench\renamed{number}"),
            0.0,
        ),
        "delete": (lambda server, number: server.do("remove", rf"bench\renamed{number}"), 0.0),
        f"list {LISTED}": (lambda server, number: server.do("scandir", "listed"), 0.0),
        "write 1 MB pieces": (lambda server, number: server.write(r"bench\stream", _bytes(STREAM_MB * MB)), STREAM_MB),
        "read 1 MB pieces": (lambda server, number: server.read(r"bench\stream"), STREAM_MB),
    }


def measured(servers: list[Server], count: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, or MB a second, of each operation on each server."""
    for server in servers:
        server.connect()
        for folder in ("bench", "listed"):
            server.do("mkdir", folder)
        for number in range(LISTED):
            server.write(rf"listed\file{number}", b"")
    found: dict[str, dict[str, float]] = {}
    for name, (do, moved_mb) in operations().items():
        times: dict[str, list[float]] = {server.name: [] for server in servers}
        rounds = max(3, count // 20) if moved_mb or name.startswith("list") else count
        for number in range(rounds):
            for server in servers:
                start = time.perf_counter()
                do(server, number)
                times[server.name].append(time.perf_counter() - start)
        found[name] = {
            one: moved_mb / statistics.median(taken) if moved_mb else 1000 * statistics.median(taken)
            for one, taken in times.items()
        }
        click.echo(_line(name, found[name], bool(moved_mb)), err=True)
    return found


def _line(name: str, row: dict[str, float], is_rate: bool) -> str:
    plain, unit = row["smbd alone"], "MB/s" if is_rate else "ms"
    shown = (f"{one} {value:.1f} {unit}" + (f" (x {value / plain:.2f})" if plain else "") for one, value in row.items())
    return f"{name:32}" + "; ".join(shown)


# -- what it is compared with ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def plain_smbd(lab: Lab, node: str, folder: Path, port: int, more: str = "", enter: list[str] | None = None) -> Any:
    """Another smbd in a node's namespace, on any folder, with the lab's users."""
    home = folder.parent / f"smbd{port}"
    for name in ("private", "ncalrpc"):
        (home / name).mkdir(parents=True)
    kept = "".join(f"{kind} directory = {home}\n" for kind in ("lock", "state", "cache", "pid"))
    config = home / "smb.conf"
    config.write_text(
        f"[global]\nserver role = standalone server\ndisable netbios = yes\nsmb ports = {port}\n{kept}"
        f"private dir = {home}/private\nncalrpc dir = {home}/ncalrpc\nlog file = {home}/log.%m\nlogging = file\n"
        f"passdb backend = smbpasswd:{passwords_of(settings_of(lab.config(node)))}\n"
        "oplocks = no\nsmb2 leases = no\nkernel oplocks = no\nstrict sync = yes\n"
        f"[files]\npath = {folder}\nread only = no\nforce user = root\nkernel share modes = no\nea support = no\n"
        f"nt acl support = no\nvfs objects = streams_xattr {more}\n"
    )
    prefix = enter or ["ip", "netns", "exec", namespace(node)]
    subprocess.run([*prefix, "smbd", "--daemon", f"--configfile={config}"], check=True, capture_output=True)
    wait_for("smbd", lambda: (home / "smbd.pid").exists(), WAIT_S)
    yield None  # it ends with the lab's namespaces


class Gluster:
    """GlusterFS, a volume of two replicas, one on each node of the lab, mounted on the first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.mount = folder / "mounted"

    def enter(self, node: str) -> list[str]:
        return ["nsenter", "--target", str(self._daemons[node].pid), "--mount", "--net"]

    def _run(self, node: str, *words: str) -> str:
        done = subprocess.run([*self.enter(node), *words], capture_output=True, text=True, timeout=WAIT_S, check=False)
        if done.returncode:
            raise LabError(f"{' '.join(words)}: {done.stdout.strip()} {done.stderr.strip()}")
        return done.stdout

    def up(self) -> None:
        self.mount.mkdir(parents=True)
        for node in NODES:
            home = self._folder / node
            for name in ("lib", "log", "brick"):
                (home / name).mkdir(parents=True)
            binds = f"mount --bind {home}/lib /var/lib/glusterd && mount --bind {home}/log /var/log/glusterfs"
            script = f"{binds} && mount -t tmpfs run /run && mkdir -p /run/gluster && exec glusterd -N"
            self._daemons[node] = subprocess.Popen(
                ["ip", "netns", "exec", namespace(node), "unshare", "-m", "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        wait_for("glusterd", lambda: all(self._answers(node) for node in NODES), WAIT_S)
        first, second = NODES
        self._run(first, "gluster", "--mode=script", "peer", "probe", ADDRESSES[second])
        wait_for("its peer", lambda: "Connected" in self._run(first, "gluster", "pool", "list"), WAIT_S)
        bricks = [f"{ADDRESSES[node]}:{self._folder / node / 'brick'}" for node in NODES]
        self._run(first, "gluster", "--mode=script", "volume", "create", "bench", "replica", "2", *bricks, "force")
        self._run(first, "gluster", "--mode=script", "volume", "start", "bench")
        self._run(first, "mount", "-t", "glusterfs", f"{ADDRESSES[first]}:/bench", str(self.mount))

    def _answers(self, node: str) -> bool:
        try:
            self._run(node, "gluster", "--mode=script", "peer", "status")
        except LabError:
            return False
        return True

    def down(self) -> None:
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()


@contextlib.contextmanager
def _servers(base: Path, gluster: bool) -> Iterator[list[Server]]:
    os.environ["TANDEM__SHARE__ENCRYPTION"] = '"off"'
    lab, beside = Lab(base / "lab"), Gluster(base / "gluster")
    try:
        lab.up(5.0, 1)
        node = str(lab.primary())
        lab.add_user(USER, PASSWORD)
        (base / "plain").mkdir()
        found = [
            Server("Tandem", VIP, SMB_PORT, FILES_SHARE),
            Server("smbd alone", ADDRESSES[node], PLAIN_PORT, "files"),
        ]
        with contextlib.ExitStack() as stack:
            stack.enter_context(plain_smbd(lab, node, base / "plain", PLAIN_PORT))
            if gluster:
                beside.up()
                first = NODES[0]
                enter = beside.enter(first)
                stack.enter_context(plain_smbd(lab, first, beside.mount, GLUSTER_PORT, "glusterfs_fuse", enter))
                found.append(Server("GlusterFS", ADDRESSES[first], GLUSTER_PORT, "files"))
            yield found
    finally:
        lab.down(keep_data=False)
        beside.down()
        shutil.rmtree(base, ignore_errors=True)


def share(count: int, folder: Path | None, gluster: bool, as_json: bool) -> None:
    """Files over SMB: the pair (two copies), plain smbd (one), and with --gluster GlusterFS (two), in turn."""
    base = Path(tempfile.mkdtemp(prefix="tandem-bench-", dir=folder or "/dev/shm"))
    try:
        import smbclient  # noqa: F401
    except ImportError:
        raise click.ClickException("smbprotocol isn't installed: pip install smbprotocol") from None
    if gluster and not shutil.which("glusterd"):
        raise click.ClickException("glusterd isn't installed: apt-get install glusterfs-server")
    with _servers(base, gluster) as servers, inside("client"):
        found = measured(servers, count)
    if as_json:
        click.echo(json.dumps(found))
