"""The pair on one machine: network namespaces for both nodes, the witness and a client, joined by a bridge.

Everything is real: etcd, gateway, HA agent, smbd; only the cables are virtual. A node's power is pulled by taking its
cable out, killing everything in its namespace, and removing the namespace.
"""

import ctypes
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tools.lab_disks import Disks, mounted, run
from tools.status import ask, order

SUBNET: Final = ipaddress.ip_network("10.99.0.0/24")
ADDRESSES: Final = {"a": "10.99.0.1", "b": "10.99.0.2", "w": "10.99.0.3", "client": "10.99.0.10"}
VIP: Final = "10.99.0.100"
DICOM_PORT: Final = 11112
VIEWER_PORT: Final = 11113  # of the destination VIEWER, on the client
HTTP_PORT: Final = 8080
AET: Final = "TANDEM"
NODES: Final = ("a", "b")
MEMBERS: Final = ("a", "b", "w")
HUB: Final = "tandem-net"
LAST: Final = Path("/run/tandem-lab.json")
UP_TIMEOUT_S: Final = 90.0
CLONE_NEWNET: Final = 0x40000000


class LabError(Exception):
    """One line for the person at the terminal."""


def namespace(name: str) -> str:
    return f"tandem-{name}"


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.strip()}


def pids_in(name: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", namespace(name)], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float, interval_s: float = 0.1) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(interval_s)


@dataclass(frozen=True)
class Lab:
    """A lab's folder; all its state is there and in the kernel."""

    dir: Path

    # -- folders -----------------------------------------------------------------------------------------------

    def node_dir(self, node: str) -> Path:
        return self.dir / node

    def config(self, node: str) -> Path:
        return self.node_dir(node) / "node.toml"

    def volumes(self, node: str) -> list[Path]:
        return sorted((self.node_dir(node) / "volumes").iterdir())

    def settings(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.dir / "lab.json").read_text())
        except FileNotFoundError:
            raise LabError(f"no lab in {self.dir}; `tandem lab up --dir DIR` brings one up") from None
        return found

    # -- up and down -------------------------------------------------------------------------------------------

    def disks(self, node: str) -> Disks:
        return Disks(self.node_dir(node), int(self.settings().get("disk_mb", 0)))

    def up(self, ttl_s: float, volumes: int, disk_mb: int = 0) -> dict[str, Any]:
        """With `disk_mb` each volume is a file system of its own, of that size."""
        if os.geteuid() != 0:
            raise LabError("needs root, for network namespaces; `sudo` or `unshare -Urnm` may help")
        for tool in ("ip", "nft", "etcd", "smbd"):
            if shutil.which(tool) is None:
                raise LabError(f"{tool} is missing; tools/setup installs what is needed")
        if HUB in namespaces():
            raise LabError("a lab is up already; `tandem lab down` ends it")
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "lab.json").write_text(json.dumps({"ttl_s": ttl_s, "volumes": volumes, "disk_mb": disk_mb}))
        LAST.write_text(json.dumps({"dir": str(self.dir)}))
        if disk_mb and not mounted(self.dir):
            # Disks that are replaced while the nodes run must appear in their mount namespaces too.
            run("mount", "--bind", str(self.dir), str(self.dir))
            run("mount", "--make-shared", str(self.dir))
        self._make_hub()
        for member in (*MEMBERS, "client"):
            self._make_namespace(member)
        for node in NODES:
            self._write_node(node, ttl_s, volumes)
        self._write_processes()
        for member in MEMBERS:
            self._start(member)
        self.wait_in_sync(UP_TIMEOUT_S)
        return self.describe()

    def down(self, *, keep_data: bool) -> None:
        for member in (*MEMBERS, "client"):
            self._kill_all(member)
        for name in sorted(namespaces() & {HUB, *(namespace(member) for member in (*MEMBERS, "client"))}):
            ip("netns", "del", name)
        if (self.dir / "lab.json").exists():
            for node in NODES:
                self.disks(node).unmount()
        while mounted(self.dir):
            run("umount", "-l", str(self.dir))
        if LAST.exists() and json.loads(LAST.read_text()).get("dir") == str(self.dir):
            LAST.unlink()
        if not keep_data:
            for member in MEMBERS:
                shutil.rmtree(self.node_dir(member), ignore_errors=True)
            (self.dir / "lab.json").unlink(missing_ok=True)
            if self.dir.is_dir() and not any(self.dir.iterdir()):
                self.dir.rmdir()

    def describe(self) -> dict[str, Any]:
        return {
            "dir": str(self.dir),
            "vip": VIP,
            "dicom_port": DICOM_PORT,
            "http_port": HTTP_PORT,
            "aet": AET,
            "nodes": {
                node: {
                    "namespace": namespace(node),
                    "address": ADDRESSES[node],
                    "config": str(self.config(node)),
                    "volumes": [str(volume) for volume in self.volumes(node)],
                }
                for node in NODES
            },
            "client": {"namespace": namespace("client"), "address": ADDRESSES["client"]},
            "primary": self.primary(),
        }

    def _make_hub(self) -> None:
        ip("netns", "add", HUB)
        ip("-n", HUB, "link", "add", "hub", "type", "bridge")
        ip("-n", HUB, "link", "set", "hub", "up")

    def _make_namespace(self, member: str) -> None:
        name = namespace(member)
        ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"to-{member}", "netns", HUB)
        ip("-n", HUB, "link", "set", f"to-{member}", "master", "hub", "up")
        ip("-n", name, "addr", "add", f"{ADDRESSES[member]}/{SUBNET.prefixlen}", "dev", "eth0")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", "eth0", "up")

    def _write_node(self, node: str, ttl_s: float, volumes: int) -> None:
        folder = self.node_dir(node)
        peer = "b" if node == "a" else "a"
        self.disks(node).create(volumes)
        paths = ", ".join(f'"{folder / "volumes" / f"disk{number}"}"' for number in range(1, volumes + 1))
        etcd = ", ".join(f'"http://{ADDRESSES[member]}:2379"' for member in _own_first(node))
        self.config(node).write_text(
            f'[node]\nname = "{node}"\nrun_dir = "{folder / "run"}"\n\n'
            f'[dicom]\naet = "{AET}"\nport = {DICOM_PORT}\n'
            f'destinations = {{ VIEWER = {{ host = "{ADDRESSES["client"]}", port = {VIEWER_PORT} }} }}\n\n'
            f'[storage]\nstate = "{folder / "state"}"\nvolumes = [{paths}]\nreserve_bytes = {64 << 20}\n\n'
            f'[cluster]\nname = "lab"\naddress = "{ADDRESSES[node]}"\npeer = "{peer}"\n'
            f'peer_address = "{ADDRESSES[peer]}"\netcd = [{etcd}]\nlease_ttl_s = {float(ttl_s)}\n'
            f'vips = ["{VIP}/{SUBNET.prefixlen}"]\n\n'
            f"[share]\nenabled = true\n\n[http]\nport = {HTTP_PORT}\n"
        )

    def _write_processes(self) -> None:
        cluster = ",".join(f"{member}=http://{ADDRESSES[member]}:2380" for member in MEMBERS)
        tandem = [sys.executable, "-m", "tools"]
        for member in MEMBERS:
            folder = self.node_dir(member)
            for name in ("log", "run", "etcd"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / "etcd").chmod(0o700)
            address = ADDRESSES[member]
            commands: dict[str, list[str]] = {
                "etcd": [
                    *("etcd", "--name", member, "--data-dir", str(folder / "etcd"), "--log-level", "warn"),
                    *("--listen-client-urls", f"http://{address}:2379", "--advertise-client-urls"),
                    *(f"http://{address}:2379", "--listen-peer-urls", f"http://{address}:2380"),
                    *("--initial-advertise-peer-urls", f"http://{address}:2380", "--initial-cluster", cluster),
                    *("--heartbeat-interval", "150", "--election-timeout", "1500", "--logger", "zap"),
                ]
            }
            if member in NODES:
                commands["gateway"] = [*tandem, "gateway", "--config", str(self.config(member))]
                commands["ha"] = [*tandem, "ha", "--config", str(self.config(member))]
            (folder / "processes.json").write_text(json.dumps(commands, indent=1))

    def _start(self, member: str) -> None:
        folder = self.node_dir(member)
        with (folder / "log" / "supervisor.log").open("ab") as log:
            subprocess.Popen(
                ["ip", "netns", "exec", namespace(member), sys.executable, "-m", "tools.supervise", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "TANDEM_FAULTS": "1"},
                cwd=Path(__file__).parent.parent,
            )

    def _kill_all(self, member: str) -> None:
        """SIGKILL for everything in the namespace, until nothing is left."""
        deadline = time.monotonic() + 20
        while pids := [pid for pid in pids_in(member) if pid != os.getpid()]:
            for pid in pids:
                _signal(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise LabError(f"processes of {member} don't die: {pids}")
            time.sleep(0.02)

    # -- faults ------------------------------------------------------------------------------------------------

    def power_off(self, node: str) -> None:
        ip("-n", HUB, "link", "set", f"to-{node}", "down")
        if node in NODES:
            self.disks(node).cut_power()
        self._kill_all(node)
        if node in NODES:
            self.disks(node).unmount()
        ip("-n", HUB, "link", "del", f"to-{node}")  # at once; the kernel takes its time to end a namespace
        ip("netns", "del", namespace(node))

    def power_on(self, node: str) -> None:
        if namespace(node) in namespaces():
            raise LabError(f"{node} is on")
        self._make_namespace(node)
        if node in NODES:
            self.disks(node).mount()
        self._start(node)

    def pid(self, node: str, process: str) -> int:
        try:
            if process == "smbd":
                return int((self.node_dir(node) / "run" / f"{node}-samba" / "smbd.pid").read_text())
            return int(json.loads((self.node_dir(node) / "pids.json").read_text())[process])
        except (OSError, KeyError, ValueError):
            raise LabError(f"{process} isn't running on {node}") from None

    def kill(self, node: str, process: str, number: int = signal.SIGKILL) -> None:
        _signal(self.pid(node, process), number)

    def order(self, node: str, name: str, **given: Any) -> dict[str, Any]:
        """Have a node's gateway carry out an order. Raises OSError or OrderFailed."""
        return order(self.node_dir(node) / "run" / f"{node}.sock", name, given)

    def replace_disk(self, node: str, number: int) -> None:
        """An empty disk in the place of a dead one, taken into service."""
        point = self.disks(node).replace(number)
        self.order(node, "volume-add", path=str(point))

    def freeze(self, node: str) -> None:
        """Stop every process of the node; its kernel goes on answering, as with a node that hangs."""
        stopped: set[int] = set()
        while fresh := set(pids_in(node)) - stopped:
            for pid in fresh:
                _signal(pid, signal.SIGSTOP)
            stopped |= fresh

    def thaw(self, node: str) -> None:
        for pid in pids_in(node):
            _signal(pid, signal.SIGCONT)

    def cut(self, node: str, other: str) -> None:
        if other == "all":
            ip("-n", HUB, "link", "set", f"to-{node}", "down")
            return
        address = ADDRESSES[other]
        table = f"lab_cut_{other}"
        self._nft(
            node,
            f"add table inet {table}\n"
            f"add chain inet {table} inward {{ type filter hook input priority -10; }}\n"
            f"add chain inet {table} outward {{ type filter hook output priority -10; }}\n"
            f"add rule inet {table} inward ip saddr {address} drop\n"
            f"add rule inet {table} outward ip daddr {address} drop\n",
        )

    def cut_port(self, node: str, port: int) -> None:
        """Cut only one TCP port, both ways: the replication link, or etcd."""
        table = f"lab_cut_{port}"
        rules = "".join(
            f"add rule inet {table} {chain} tcp {side} {port} drop\n"
            for chain in ("inward", "outward")
            for side in ("sport", "dport")
        )
        self._nft(
            node,
            f"add table inet {table}\n"
            f"add chain inet {table} inward {{ type filter hook input priority -10; }}\n"
            f"add chain inet {table} outward {{ type filter hook output priority -10; }}\n{rules}",
        )

    def cut_one_way(self, node: str, port: int) -> None:
        """Drop what the node sends on one TCP port; what comes in passes. `join_port` mends it."""
        table = f"lab_cut_{port}"
        self._nft(
            node,
            f"add table inet {table}\n"
            f"add chain inet {table} outward {{ type filter hook output priority -10; }}\n"
            f"add rule inet {table} outward tcp sport {port} drop\n"
            f"add rule inet {table} outward tcp dport {port} drop\n",
        )

    def join_port(self, node: str, port: int) -> None:
        self._nft(node, f"delete table inet lab_cut_{port}\n")

    def join(self, node: str, other: str) -> None:
        if other == "all":
            ip("-n", HUB, "link", "set", f"to-{node}", "up")
            return
        table = f"lab_cut_{other}"
        self._nft(node, f"add table inet {table}\ndelete table inet {table}\n")

    def _nft(self, node: str, script: str) -> None:
        command = ["ip", "netns", "exec", namespace(node), "nft", "-f", "-"]
        done = subprocess.run(command, input=script, capture_output=True, text=True)
        if done.returncode:
            raise LabError(f"nft: {done.stderr.strip()}")

    # -- looking -----------------------------------------------------------------------------------------------

    def command(self, member: str, words: list[str]) -> tuple[list[str], dict[str, str]]:
        """(argv, environment) that run `words` on a node or the client."""
        environment = dict(os.environ)
        if member in NODES:
            environment["TANDEM_CONFIG"] = str(self.config(member))
        return ["ip", "netns", "exec", namespace(member), *words], environment

    def node_status(self, node: str) -> dict[str, Any] | None:
        try:
            return ask(self.node_dir(node) / "run" / f"{node}.sock")
        except OSError:
            return None

    def status(self) -> dict[str, Any]:
        up = namespaces()
        nodes = {node: self.node_status(node) if namespace(node) in up else None for node in NODES}
        return {"dir": str(self.dir), "primary": self._primary_of(nodes), "nodes": nodes}

    def primary(self) -> str | None:
        return self._primary_of({node: self.node_status(node) for node in NODES})

    @staticmethod
    def _primary_of(nodes: dict[str, dict[str, Any] | None]) -> str | None:
        """The node that serves, with the highest epoch if two think so (one of them may be frozen or cut off)."""
        leading = [
            status
            for status in nodes.values()
            if status and status["role"] == "primary" and status["mode"] not in ("PROMOTING", "READONLY")
        ]
        leading.sort(key=lambda status: int(status["epoch"]))
        return str(leading[-1]["node"]) if leading else None

    def in_sync(self) -> bool:
        found = [self.node_status(node) for node in NODES]
        modes = sorted(str(status["mode"]) for status in found if status)
        return modes == ["PAIR", "SYNC"] and any(status and status["vips"] for status in found)

    def wait_in_sync(self, timeout_s: float) -> None:
        wait_for(f"the pair to be in sync (logs in {self.dir}/NODE/log)", self.in_sync, timeout_s)


def _own_first(node: str) -> list[str]:
    return [node, *(member for member in MEMBERS if member != node)]


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def find_lab(folder: Path | None) -> Lab:
    """The lab in `folder`, or the one brought up last. Raises LabError."""
    if folder is None:
        try:
            folder = Path(json.loads(LAST.read_text())["dir"])
        except (OSError, ValueError, KeyError):
            raise LabError("no lab is up; `tandem lab up --dir DIR` brings one up") from None
    return Lab(folder.resolve())


@contextmanager
def inside(member: str) -> Iterator[None]:
    """This process's network is that of a lab member meanwhile; children and new threads have it too. Needs root."""
    with open("/proc/self/ns/net", "rb") as before, open(f"/run/netns/{namespace(member)}", "rb") as there:
        _set_network(there.fileno())
        try:
            yield
        finally:
            _set_network(before.fileno())


def _set_network(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise LabError(f"setns: {os.strerror(ctypes.get_errno())}")
