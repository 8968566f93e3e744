"""CTDB with smbd in the lab's network namespaces: the outage that an SMB client sees, for comparison with Tandem.

Two nodes with a public address and smbd on both, as a site has it that isn't DICOM-aware; a mount namespace gives each
node its own folders of CTDB. Neither shared storage nor a cluster lock: only who answers for the address is measured.
"""

import contextlib
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tools.benchmarks.outage import Probe
from tools.lab import network as lab_network
from tools.lab.network import (
    ADDRESSES,
    NODES,
    SUBNET,
    VIP,
    inside,
    ip,
    kill_all,
    namespace,
    namespaces,
    pids_in,
    send_signal,
)
from tools.lab.pair import wait_for

SMB_PORT: Final = 445
CONNECT_S: Final = 0.25
ANSWER_S: Final = 1.0
PAUSE_S: Final = 0.02
CALM: Final = 20
WAIT_S: Final = 180.0
SCRIPTS: Final = Path("/usr/share/ctdb/events/legacy")
TUNED: Final = "KeepaliveInterval=1\nKeepaliveLimit=2\n"
FOLDERS: Final = {"etc": "/etc/ctdb", "lib": "/var/lib/ctdb", "run": "/run/ctdb"}


def smb_client() -> Probe:
    """Connects to the share's server at the virtual address and negotiates, again and again."""

    def attempt(answered: Callable[[], None], _stopped: Callable[[], bool]) -> None:
        with contextlib.suppress(OSError):
            if _negotiated(VIP):
                answered()

    return Probe(attempt, pause_s=PAUSE_S, place=lambda: inside("client"))


def _negotiated(address: str) -> bool:
    """MS-SMB2 2.2.3."""
    header = struct.pack("<4sHHIHHIIQIIQ16s", b"\xfeSMB", 64, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, bytes(16))
    body = struct.pack("<HHHHI16sQHH", 36, 2, 1, 0, 0, bytes(16), 0, 0x0202, 0x0210)
    with socket.create_connection((address, SMB_PORT), CONNECT_S) as connection:
        connection.settimeout(ANSWER_S)
        connection.sendall(struct.pack("!I", len(header) + len(body)) + header + body)
        return connection.recv(8)[4:] == b"\xfeSMB"


class Ctdb:
    """Two nodes with ctdbd and smbd."""

    def __init__(self, folder: Path, tuned: bool) -> None:
        self._folder, self._tuned = folder, tuned

    def up(self) -> None:
        for tool in ("ctdbd", "ethtool", "smbd"):
            if shutil.which(tool) is None:
                raise lab_network.LabError(f"{tool} is missing; apt-get install ctdb ethtool samba")
        lab_network.make_hub()
        lab_network.make_namespace("client")
        for node in NODES:
            self.start(node)
        wait_for("CTDB to have the address", self._calm, WAIT_S)

    def down(self) -> None:
        for member in (*NODES, "client"):
            if namespace(member) in namespaces():
                kill_all(member)
                ip("netns", "del", namespace(member))
        if lab_network.HUB in namespaces():
            ip("netns", "del", lab_network.HUB)

    def start(self, node: str) -> None:
        home = self._folder / node
        shutil.rmtree(home, ignore_errors=True)
        for name in FOLDERS:
            (home / name).mkdir(parents=True)
        (home / "lib" / "volatile").mkdir()
        (home / "lib" / "persistent").mkdir()
        (home / "lib" / "state").mkdir()
        shutil.copytree("/etc/ctdb", home / "etc", dirs_exist_ok=True, symlinks=True)
        legacy = home / "etc" / "events" / "legacy"
        for script in legacy.iterdir():
            script.unlink()
        (legacy / "10.interface.script").symlink_to(SCRIPTS / "10.interface.script")
        (home / "etc" / "ctdb.conf").write_text(f"[logging]\nlocation = file:{home}/log.ctdb\nlog level = NOTICE\n")
        (home / "etc" / "nodes").write_text("".join(f"{ADDRESSES[one]}\n" for one in NODES))
        (home / "etc" / "public_addresses").write_text(f"{VIP}/{SUBNET.prefixlen} eth0\n")
        (home / "etc" / "ctdb.tunables").write_text(TUNED if self._tuned else "")
        lab_network.make_namespace(node)
        self._start_smbd(node, home)
        self.run(node, "ctdbd")

    def _start_smbd(self, node: str, home: Path) -> None:
        config = home / "smb.conf"
        kept = "".join(f"{kind} directory = {home}\n" for kind in ("lock", "state", "cache", "pid", "private"))
        config.write_text(
            f"[global]\nmap to guest = Bad User\nserver role = standalone server\ndisable netbios = yes\n{kept}"
        )
        command = ["smbd", "--daemon", f"--configfile={config}"]
        subprocess.run(["ip", "netns", "exec", namespace(node), *command], check=True, capture_output=True)

    def run(self, node: str, *words: str, check: bool = True) -> str:
        """A command on a node that sees the node's own folders of CTDB."""
        home = self._folder / node
        binds = [f"mkdir -p {place} && mount --bind {home / name} {place}" for name, place in FOLDERS.items()]
        script = " && ".join([*binds, f"exec {' '.join(words)}"])
        argv = ["ip", "netns", "exec", namespace(node), "unshare", "-m", "sh", "-c", script]
        done = subprocess.run(argv, check=check, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        return done.stdout

    def holder(self) -> str | None:
        found = lab_network.holders(VIP)
        return found[0] if len(found) == 1 else None

    def _calm(self) -> bool:
        states = [self.run(node, "ctdb", "-X", "status", check=False) for node in NODES]
        lines = [line for text in states for line in text.splitlines()[1:]]
        healthy = len(lines) == 4 and all(line.split("|")[3:9] == ["0"] * 6 for line in lines)
        return healthy and self.holder() is not None

    def recover(self, node: str) -> None:
        """Back to two healthy nodes after any fault."""
        if namespace(node) not in namespaces():
            self.start(node)
        elif not any(_command(pid).startswith("ctdb") for pid in pids_in(node)):
            with contextlib.suppress(lab_network.LabError):
                ip("-n", namespace(node), "addr", "del", f"{VIP}/{SUBNET.prefixlen}", "dev", "eth0")
            self.run(node, "ctdbd")
        self.run(node, "ctdb", "enable", check=False)
        wait_for("both nodes to be healthy", self._calm, WAIT_S, 0.5)

    # -- faults ------------------------------------------------------------------------------------------------

    def disable(self, node: str) -> None:
        self.run(node, "ctdb", "disable")

    def kill(self, node: str) -> None:
        """Of CTDB's daemon with its helpers; smbd and the address stay where they are."""
        for pid in pids_in(node):
            if _command(pid).startswith("ctdb"):
                send_signal(pid, signal.SIGKILL)

    def power_off(self, node: str) -> None:
        lab_network.pull(node)
        kill_all(node)
        lab_network.unplug_for_good(node)
        ip("netns", "del", namespace(node))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def outages(folder: Path, tuned: bool, runs: int) -> Iterator[tuple[str, list[float]]]:
    """(fault, seconds without an answer of smbd) for each kind of fault."""
    ctdb = Ctdb(folder, tuned)
    faults: dict[str, Callable[[str], None]] = {
        "planned (disable)": ctdb.disable,
        "kill -9 ctdbd": ctdb.kill,
        "power loss": ctdb.power_off,
    }
    try:
        ctdb.up()
        for name, fault in faults.items():
            gaps = []
            for _ in range(runs):
                gaps.append(_one(ctdb, fault))
            yield name, gaps
    finally:
        ctdb.down()


def _one(ctdb: Ctdb, fault: Callable[[str], None]) -> float:
    with smb_client() as probe:
        probe.wait_for_more(CALM, WAIT_S)
        holder = ctdb.holder()
        if holder is None:
            raise lab_network.LabError("nobody, or more than one node, has the address")
        started = time.monotonic()
        fault(holder)
        probe.wait_for_more(CALM, WAIT_S)
        wait_for("the address to have moved", lambda: holder != ctdb.holder(), WAIT_S)
        probe.wait_for_more(CALM, WAIT_S)
        gap = probe.longest_gap_s(started)
    ctdb.recover(holder)
    return gap
