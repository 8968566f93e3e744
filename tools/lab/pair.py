"""The pair on one machine: network namespaces for both nodes, the witness and a client, joined by a bridge.

Everything is real: etcd, gateway, HA agent, smbd; only the cables are virtual. A node's power is pulled by taking its
cable out, killing everything in its namespace, and removing the namespace.
"""

import contextlib
import importlib.util
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ha.reach.followed import own_group
from storage.control_client import ask, order
from tools.cli.certificates import Authority
from tools.lab import network as lab_network
from tools.lab.disks import Disks, mounted, run
from tools.lab.network import (
    ADDRESSES,
    HUB,
    MEMBERS,
    NODES,
    PRIVATE,
    READ_VIP,
    SUBNET,
    SUBNET6,
    VIP,
    VIP6,
    LabError,
    ip,
    kill_all,
    namespace,
    namespaces,
    pids_in,
    send_signal,
)

DICOM_PORT: Final = 11112
VIEWER_PORT: Final = 11113  # of the destination VIEWER, on the client
HTTP_PORT: Final = 8080
SMB_PORT: Final = 445
FILES_SHARE: Final = "files"
ACCOUNTS: Final = "Tandem share lab"  # what those made for the lab's users of the share are called
AET: Final = "TANDEM"
VOLUMES_MAX: Final = 24  # of each node
LAST: Final = Path("/run/tandem-lab.json")
CERTIFICATES: Final = {"ca_file": "ca.crt", "certificate": "node.crt", "key": "node.key"}
UP_TIMEOUT_S: Final = 90.0
STATE_AFTER: Final = 50  # entries: a node that was away for so long takes the state, one that wasn't the log


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float, interval_s: float = 0.1) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(interval_s)


def can_mount() -> bool:
    """The share's files can be shown here as a file system."""
    return importlib.util.find_spec("pyfuse3") is not None and Path("/dev/fuse").exists()


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

    def files(self, node: str) -> Path:
        """Where the share's files are mounted, for processes of the node."""
        return self.node_dir(node) / "files"

    def files_from_outside(self, node: str) -> Path:
        """The same for others, as long as it is mounted. Raises LabError."""
        return Path(f"/proc/{self.pid(node, 'mount')}/root{self.files(node)}")

    def settings(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.dir / "lab.json").read_text())
        except FileNotFoundError:
            raise LabError(f"no lab in {self.dir}; `tandem lab up --dir DIR` brings one up") from None
        return found

    # -- up and down -------------------------------------------------------------------------------------------

    def disks(self, node: str) -> Disks:
        return Disks(self.node_dir(node), int(self.settings().get("disk_mb", 0)))

    def up(
        self, ttl_s: float, volumes: int, disk_mb: int = 0, *, tls: bool = True, version: Path | None = None
    ) -> dict[str, Any]:
        """With `disk_mb` each volume is a file system of its own, of that size. `version`: the source tree of another
        version of Tandem that both nodes run."""
        if os.geteuid() != 0:
            raise LabError("needs root, for network namespaces; `sudo` or `unshare -Urnm` may help")
        for tool in ("ip", "nft", "etcd", "smbd"):
            if shutil.which(tool) is None:
                raise LabError(f"{tool} is missing; tools/setup installs what is needed")
        if HUB in namespaces():
            raise LabError("a lab is up already; `tandem lab down` ends it")
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "lab.json").write_text(
            json.dumps({"ttl_s": ttl_s, "volumes": volumes, "disk_mb": disk_mb, "tls": tls})
        )
        LAST.write_text(json.dumps({"dir": str(self.dir)}))
        if disk_mb and not mounted(self.dir):
            # Disks that are replaced while the nodes run must appear in their mount namespaces too.
            run("mount", "--bind", str(self.dir), str(self.dir))
            run("mount", "--make-shared", str(self.dir))
        lab_network.make_hub()
        for member in (*MEMBERS, "client"):
            lab_network.make_namespace(member)
        if tls:
            self.issue_certificates()
        for node in NODES:
            self.disks(node).create(volumes)
        self._write_processes(tls)
        for node in NODES:
            self.use_version(node, version, files=version is None and can_mount())
        for member in MEMBERS:
            self._start(member)
        self.wait_in_sync(UP_TIMEOUT_S)
        return self.describe()

    def down(self, *, keep_data: bool) -> None:
        for member in (*MEMBERS, "client"):
            kill_all(member)
        for name in sorted(namespaces() & {HUB, *(namespace(member) for member in (*MEMBERS, "client"))}):
            ip("netns", "del", name)
        if (self.dir / "lab.json").exists():
            for node in NODES:
                self.disks(node).unmount()
        while mounted(self.dir):
            run("umount", "-l", str(self.dir))
        with contextlib.suppress(OSError):
            for group in own_group().glob("tandem-follows-lab-*"):  # of what followed the address
                group.rmdir()
        for account in pwd.getpwall():
            if account.pw_gecos == ACCOUNTS:
                run("userdel", account.pw_name)
        if LAST.exists() and json.loads(LAST.read_text()).get("dir") == str(self.dir):
            LAST.unlink()
        if not keep_data:
            for member in MEMBERS:
                shutil.rmtree(self.node_dir(member), ignore_errors=True)
            shutil.rmtree(self.authority.folder, ignore_errors=True)
            (self.dir / "lab.json").unlink(missing_ok=True)
            if self.dir.is_dir() and not any(self.dir.iterdir()):
                self.dir.rmdir()

    def describe(self) -> dict[str, Any]:
        return {
            "dir": str(self.dir),
            "vip": VIP,
            "read_vip": READ_VIP,
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
            "share": {
                "files": FILES_SHARE if can_mount() else "",
                "archive": "archive",
                "inbox": "inbox" if can_mount() else "",
                "port": SMB_PORT,
            },
            "primary": self.primary(),
        }

    @property
    def authority(self) -> Authority:
        return Authority(self.dir / "authority")

    def issue_certificates(self) -> None:
        if not self.authority.certificate.exists():
            self.authority.make("lab")
        for member in MEMBERS:
            self.authority.issue(self.node_dir(member) / "tls", member, lab_network.addresses_of(member))

    def _write_config(self, node: str, files: bool) -> None:
        """`files`: the share's are mounted; a version that doesn't know any refuses to hear of them."""
        settings = self.settings()
        folder = self.node_dir(node)
        peer = "b" if node == "a" else "a"
        numbers = range(1, settings["volumes"] + 1)
        paths = ", ".join(f'"{folder / "volumes" / f"disk{number}"}"' for number in numbers)
        scheme = "https" if settings["tls"] else "http"
        etcd = ", ".join(f'"{scheme}://{ADDRESSES[member]}:2379"' for member in _own_first(node))
        tls = ", ".join(f'{key} = "{folder / "tls" / name}"' for key, name in CERTIFICATES.items())
        mount = f'mount = "{self.files(node)}"\nfiles = "{FILES_SHARE}"\n' if files else ""
        self.config(node).write_text(
            f'[node]\nname = "{node}"\nrun_dir = "{folder / "run"}"\n\n'
            f'[dicom]\naet = "{AET}"\nport = {DICOM_PORT}\n'
            f'destinations = {{ VIEWER = {{ host = "{ADDRESSES["client"]}", port = {VIEWER_PORT} }} }}\n\n'
            f'[storage]\nstate = "{folder / "state"}"\nvolumes = [{paths}]\nreserve_bytes = {64 << 20}\n\n'
            f'[cluster]\nname = "lab"\naddress = "{PRIVATE[node]}"\npeer = "{peer}"\n'
            f'peer_address = "{PRIVATE[peer]}"\netcd = [{etcd}]\nlease_ttl_s = {float(settings["ttl_s"])}\n'
            f"state_after = {STATE_AFTER}\n"
            f'links = [{{ address = "{ADDRESSES[node]}", peer_address = "{ADDRESSES[peer]}" }}]\n'
            f'vips = ["{VIP}/{SUBNET.prefixlen}", "{VIP6}/{SUBNET6.prefixlen}", '
            f'{{ address = "{READ_VIP}/{SUBNET.prefixlen}", prefer = "standby" }}]\n'
            + (f"tls = {{ {tls} }}\n\n" if settings["tls"] else "\n")
            + f'[share]\nenabled = true\nguest = true\nfolder = "{folder / "share"}"\n{mount}\n'
            f"[http]\nport = {HTTP_PORT}\n\n"
            f'[alerts]\ncommand = ["sh", "-c", "cat >> {folder}/alerts.jsonl; echo >> {folder}/alerts.jsonl"]\n'
            f"settle_s = 2.0\n"
        )

    def _write_processes(self, tls: bool) -> None:
        scheme = "https" if tls else "http"
        cluster = ",".join(f"{member}={scheme}://{ADDRESSES[member]}:2380" for member in MEMBERS)
        for member in MEMBERS:
            folder = self.node_dir(member)
            for name in ("log", "run", "etcd"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / "etcd").chmod(0o700)
            address = ADDRESSES[member]
            commands: dict[str, list[str]] = {
                "etcd": [
                    *("etcd", "--name", member, "--data-dir", str(folder / "etcd"), "--log-level", "warn"),
                    *("--listen-client-urls", f"{scheme}://{address}:2379", "--advertise-client-urls"),
                    *(f"{scheme}://{address}:2379", "--listen-peer-urls", f"{scheme}://{address}:2380"),
                    *("--initial-advertise-peer-urls", f"{scheme}://{address}:2380", "--initial-cluster", cluster),
                    *("--auto-compaction-retention", "1h", *(_etcd_tls(folder / "tls") if tls else ())),
                    *("--heartbeat-interval", "150", "--election-timeout", "1500", "--logger", "zap"),
                ]
            }
            (folder / "processes.json").write_text(json.dumps(commands, indent=1))

    def use_version(self, node: str, version: Path | None, *, files: bool = can_mount()) -> None:
        """A node runs this source tree, or ours, from the next time on that it is powered on. `files`: and mounts the
        share's; whose peer has them in its log is not followed by a version that doesn't know any."""
        self._write_config(node, files)
        processes = self.node_dir(node) / "processes.json"
        commands = json.loads(processes.read_text())
        tandem = [*(("env", f"PYTHONPATH={version}") if version else ()), sys.executable, "-m", "tools"]
        for name in ("gateway", "ha"):
            commands[name] = [*tandem, name, "--config", str(self.config(node))]
        for name in ("mount", "inbox"):
            commands.pop(name, None)
        if files:
            self.files(node).mkdir(exist_ok=True)
            commands["mount"] = [*tandem, "mount", str(self.files(node)), "--config", str(self.config(node))]
            commands["inbox"] = [*tandem, "inbox", "--config", str(self.config(node))]
        processes.write_text(json.dumps(commands, indent=1))

    def _start(self, member: str) -> None:
        folder = self.node_dir(member)
        with (folder / "log" / "supervisor.log").open("ab") as log:
            subprocess.Popen(
                ["ip", "netns", "exec", namespace(member), sys.executable, "-m", "tools.lab.supervise", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "TANDEM_FAULTS": "1"},
                cwd=Path(__file__).parent.parent.parent,
            )

    # -- faults ------------------------------------------------------------------------------------------------

    def power_off(self, node: str) -> None:
        lab_network.pull(node)
        if node in NODES:
            self.disks(node).cut_power()
        kill_all(node)
        if node in NODES:
            self.disks(node).unmount()
        lab_network.unplug_for_good(node)  # at once; the kernel takes its time to end a namespace
        ip("netns", "del", namespace(node))

    def power_on(self, node: str) -> None:
        if namespace(node) in namespaces():
            raise LabError(f"{node} is on")
        lab_network.make_namespace(node)
        if node in NODES:
            self.disks(node).mount()
        self._start(node)

    def pid(self, node: str, process: str) -> int:
        try:
            if process == "smbd":
                return int((self.node_dir(node) / "share" / "smbd.pid").read_text())
            return int(json.loads((self.node_dir(node) / "pids.json").read_text())[process])
        except (OSError, KeyError, ValueError):
            raise LabError(f"{process} isn't running on {node}") from None

    def kill(self, node: str, process: str, number: int = signal.SIGKILL) -> None:
        send_signal(self.pid(node, process), number)

    def order(self, node: str, name: str, **given: Any) -> dict[str, Any]:
        """Have a node's gateway carry out an order. Raises OSError or OrderFailed."""
        return order(self.node_dir(node) / "run" / f"{node}.sock", name, given)

    def add_user(self, name: str, password: str) -> None:
        """Let somebody use the share. Raises LabError."""
        argv, environment = self.command(self.primary() or NODES[0], ["tandem", "share", "user", "add", name])
        given = f"{password}\n" * 2
        done = subprocess.run(argv, env=environment, input=given, capture_output=True, text=True)
        if done.returncode:
            raise LabError(f"tandem share user add: {done.stderr.strip()}")

    def replace_disk(self, node: str, number: int) -> None:
        """An empty disk in the place of a dead one, taken into service."""
        point = self.disks(node).replace(number)
        self.order(node, "volume-add", path=str(point))

    def freeze(self, node: str) -> None:
        """Stop every process of the node; its kernel goes on answering, as with a node that hangs."""
        stopped: set[int] = set()
        while fresh := set(pids_in(node)) - stopped:
            for pid in fresh:
                send_signal(pid, signal.SIGSTOP)
            stopped |= fresh

    def thaw(self, node: str) -> None:
        for pid in pids_in(node):
            send_signal(pid, signal.SIGCONT)

    def cut(self, node: str, other: str, *, inward: bool = True, outward: bool = True) -> None:
        """Cut a node off another member, or from all; only what comes in, or what goes out, if so asked."""
        if other == "all":
            lab_network.pull(node)
        elif other in ("service", "private"):
            lab_network.pull(node, which=[("to-" if other == "service" else "private-") + node])
        else:
            lab_network.cut(node, other, inward=inward, outward=outward)

    def join(self, node: str, other: str) -> None:
        """Mend what `cut` cut."""
        if other in ("all", "service", "private"):
            lab_network.plug(node)
        else:
            lab_network.mend(node, other)

    def slow(self, node: str, mbit: int) -> None:
        """Let no more than so many megabits a second reach a node on each of its cables; 0: as fast as it goes."""
        lab_network.slow(node, mbit)

    def cut_etcd(self, node: str, other: str) -> None:
        """Cut only what a node and another member say over etcd's ports; `join(node, "etcd_" + other)` mends it."""
        lab_network.cut_etcd(node, other)

    def cut_port(self, node: str, port: int) -> None:
        """Cut only one TCP port, both ways: the replication link, or etcd."""
        lab_network.cut_port(node, port)

    def cut_one_way(self, node: str, port: int) -> None:
        """Drop what the node sends on one TCP port; what comes in passes. `join_port` mends it."""
        lab_network.cut_port(node, port, inward=False)

    def join_port(self, node: str, port: int) -> None:
        lab_network.mend(node, port)

    # -- looking -----------------------------------------------------------------------------------------------

    def command(self, member: str, words: list[str]) -> tuple[list[str], dict[str, str]]:
        """(argv, environment) that run `words` on a node or the client."""
        beside = str(
            Path(sys.executable).parent
        )  # `tandem`; behind DCMTK's tools, whose names pynetdicom's have as well
        environment = {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{beside}"}
        if member in NODES:
            environment["TANDEM_CONFIG"] = str(self.config(member))
        return ["ip", "netns", "exec", namespace(member), *words], environment

    def node_status(self, node: str) -> dict[str, Any] | None:
        try:
            return ask(self.node_dir(node) / "run" / f"{node}.sock")
        except OSError:
            return None

    def alerts(self, node: str) -> list[dict[str, Any]]:
        """All that a node has told, oldest first."""
        try:
            lines = (self.node_dir(node) / "alerts.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.strip()]

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
        return _are_in_sync([self.node_status(node) for node in NODES])

    def complete(self) -> bool:
        """In sync, and neither node lacks a copy of anything."""
        found = [self.node_status(node) for node in NODES]
        same = len({status and status["instances"] for status in found}) == 1
        return _are_in_sync(found) and same and all(status and status["healing"]["missing"] == 0 for status in found)

    def files_complete(self) -> bool:
        """By both nodes' words each holds every file of the share: the standby's rows are half a second behind."""
        found = [self.node_status(node) for node in NODES]
        return all(one and not one["files"]["single_copy"] and not one["files"]["dirty"] for one in found)

    def wait_in_sync(self, timeout_s: float) -> None:
        wait_for(f"the pair to be in sync (logs in {self.dir}/NODE/log)", self.in_sync, timeout_s)


def _are_in_sync(found: list[dict[str, Any] | None]) -> bool:
    modes = sorted(str(status["mode"]) for status in found if status)
    return modes == ["PAIR", "SYNC"] and any(status and status["vips"] for status in found)


def _etcd_tls(folder: Path) -> list[str]:
    """Only who has a certificate of the cluster is listened to, by members and for clients."""
    files = [str(folder / name) for name in CERTIFICATES.values()]
    flags = []
    for prefix in ("", "peer-"):
        for flag, file in zip(("trusted-ca-file", "cert-file", "key-file"), files, strict=True):
            flags += [f"--{prefix}{flag}", file]
    return [*flags, "--client-cert-auth", "--peer-client-cert-auth"]


def _own_first(node: str) -> list[str]:
    return [node, *(member for member in MEMBERS if member != node)]


def find_lab(folder: Path | None) -> Lab:
    """The lab in `folder`, or the one brought up last. Raises LabError."""
    if folder is None:
        try:
            folder = Path(json.loads(LAST.read_text())["dir"])
        except (OSError, ValueError, KeyError):
            raise LabError("no lab is up; `tandem lab up --dir DIR` brings one up") from None
    return Lab(folder.resolve())
