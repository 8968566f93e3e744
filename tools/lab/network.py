"""The lab's cables: network namespaces for its members, joined by two bridges, and ways to cut them.

The service network has everybody, the private one only the two nodes, as a cable between them would.
"""

import ctypes
import ipaddress
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

SUBNET: Final = ipaddress.ip_network("10.99.0.0/24")
SUBNET6: Final = ipaddress.ip_network("fd99::/64")
PRIVATE_SUBNET: Final = ipaddress.ip_network("10.98.0.0/24")
ADDRESSES: Final = {"a": "10.99.0.1", "b": "10.99.0.2", "w": "10.99.0.3", "client": "10.99.0.10"}
ADDRESSES6: Final = {"a": "fd99::1", "b": "fd99::2", "w": "fd99::3", "client": "fd99::10"}
PRIVATE: Final = {"a": "10.98.0.1", "b": "10.98.0.2"}
VIP: Final = "10.99.0.100"
VIP6: Final = "fd99::100"
READ_VIP: Final = "10.99.0.101"
NODES: Final = ("a", "b")
MEMBERS: Final = ("a", "b", "w")
ETCD_CLIENT_PORT: Final = 2379
ETCD_PEER_PORT: Final = 2380
HUB: Final = "tandem-net"
CLONE_NEWNET: Final = 0x40000000
KILL_S: Final = 20.0


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


def send_signal(pid: int, number: int) -> None:
    """Nothing happens if it has ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_all(name: str) -> None:
    """SIGKILL for everything in the namespace but this process, until nothing is left. Raises LabError."""
    deadline = time.monotonic() + KILL_S
    while pids := [pid for pid in pids_in(name) if pid != os.getpid()]:
        for pid in pids:
            send_signal(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise LabError(f"processes of {name} don't die: {pids}")
        time.sleep(0.02)


# -- cables ------------------------------------------------------------------------------------------------------------


def make_hub() -> None:
    ip("netns", "add", HUB)
    for bridge in ("hub", "private"):
        ip("-n", HUB, "link", "add", bridge, "type", "bridge")
        ip("-n", HUB, "link", "set", bridge, "up")


def make_namespace(member: str) -> None:
    name = namespace(member)
    ip("netns", "add", name)
    ip("-n", name, "link", "set", "lo", "up")
    _plug(member, "eth0", f"to-{member}", "hub")
    ip("-n", name, "addr", "add", f"{ADDRESSES[member]}/{SUBNET.prefixlen}", "dev", "eth0")
    ip("-n", name, "addr", "add", f"{ADDRESSES6[member]}/{SUBNET6.prefixlen}", "dev", "eth0", "nodad")
    ip("-n", name, "link", "set", "eth0", "up")
    if member in PRIVATE:
        _plug(member, "eth1", f"private-{member}", "private")
        ip("-n", name, "addr", "add", f"{PRIVATE[member]}/{PRIVATE_SUBNET.prefixlen}", "dev", "eth1")
        ip("-n", name, "link", "set", "eth1", "up")


def _plug(member: str, interface: str, port: str, bridge: str) -> None:
    ip("link", "add", interface, "netns", namespace(member), "type", "veth", "peer", "name", port, "netns", HUB)
    ip("-n", HUB, "link", "set", port, "master", bridge, "up")


def ports(member: str) -> list[str]:
    """The hub's ends of a member's cables."""
    return [f"to-{member}", *([f"private-{member}"] if member in PRIVATE else [])]


def pull(member: str, *, which: Iterable[str] = ()) -> None:
    """Take cables out, all by default."""
    for port in which or ports(member):
        ip("-n", HUB, "link", "set", port, "down")


def plug(member: str) -> None:
    for port in ports(member):
        ip("-n", HUB, "link", "set", port, "up")


def slow(member: str, mbit: int) -> None:
    """Let no more than so many megabits a second reach a member on each of its cables; what comes too fast queues, for
    0.4 s at most, as in a switch. 0: as fast as it goes."""
    shape = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "128kb", "latency", "400ms"]
    for port in ports(member):
        command = ["replace", "dev", port, *shape] if mbit else ["delete", "dev", port, "root"]
        done = subprocess.run(["ip", "netns", "exec", HUB, "tc", "qdisc", *command], capture_output=True, text=True)
        if done.returncode and mbit:
            raise LabError(f"tc: {done.stderr.strip()}")


def unplug_for_good(member: str) -> None:
    for port in ports(member):
        ip("-n", HUB, "link", "del", port)


# -- packets -----------------------------------------------------------------------------------------------------------


def addresses_of(member: str) -> list[str]:
    return [ADDRESSES[member], *([PRIVATE[member]] if member in PRIVATE else [])]


def cut(node: str, other: str, *, inward: bool = True, outward: bool = True) -> None:
    """Drop what comes from and what goes to another member, or one of both."""
    rules = [f"inward ip saddr {address}" for address in addresses_of(other) if inward]
    rules += [f"outward ip daddr {address}" for address in addresses_of(other) if outward]
    _drop(node, f"lab_cut_{other}", rules)


def cut_port(node: str, port: int, *, inward: bool = True) -> None:
    """Drop what a node sends on one TCP port, and what it gets there if `inward`."""
    chains = ("inward", "outward") if inward else ("outward",)
    _drop(node, f"lab_cut_{port}", [f"{chain} tcp {side} {port}" for chain in chains for side in ("sport", "dport")])


def cut_etcd(node: str, other: str) -> None:
    """Drop only what goes over etcd's ports between a node and another member."""
    ends = [("inward", "saddr"), ("outward", "daddr")]
    rules = [
        f"{chain} ip {end} {ADDRESSES[other]} tcp {side} {{ {ETCD_CLIENT_PORT}, {ETCD_PEER_PORT} }}"
        for chain, end in ends
        for side in ("sport", "dport")
    ]
    _drop(node, f"lab_cut_etcd_{other}", rules)


def mend(node: str, what: str | int) -> None:
    """What `cut` or `cut_port` did; nothing if that wasn't done."""
    table = f"lab_cut_{what}"
    nft(node, f"add table inet {table}\ndelete table inet {table}\n")


def _drop(node: str, table: str, rules: Iterable[str]) -> None:
    lines = [
        f"add table inet {table}",
        f"add chain inet {table} inward {{ type filter hook input priority -10; }}",
        f"add chain inet {table} outward {{ type filter hook output priority -10; }}",
        *(f"add rule inet {table} {rule} drop" for rule in rules),
    ]
    nft(node, "\n".join(lines) + "\n")


def nft(node: str, script: str) -> None:
    command = ["ip", "netns", "exec", namespace(node), "nft", "-f", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"nft: {done.stderr.strip()}")


def holders(address: str) -> list[str]:
    """Members that have an address on an interface, whether or not their fence lets it through."""
    found = []
    for member in sorted(namespaces() & {namespace(member) for member in MEMBERS}):
        done = subprocess.run(["ip", "-n", member, "-j", "addr"], capture_output=True, text=True)
        local = {one.get("local") for link in json.loads(done.stdout or "[]") for one in link.get("addr_info", [])}
        if address in local:
            found.append(member.removeprefix("tandem-"))
    return found


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
