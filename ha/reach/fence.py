"""The fence: an nftables set, in the kernel, whose elements run out unless they are refreshed.

Packets for a virtual address, and ARP for it, pass only while the address is in the set. So a node whose processes are
stopped falls silent by itself when its lease has run out, while its kernel would otherwise go on answering.
"""

import subprocess
from collections.abc import Sequence

from conf.settings import VirtualAddress

TABLE = "tandem_fence"
COMMAND_TIMEOUT_S = 10.0


class FenceFailed(Exception):
    """nft didn't do it; without the fence the address must not be taken."""


class Fence:
    """The fence for these addresses; several may share the tables, `install` is called on one that has them all."""

    def __init__(self, vips: Sequence[VirtualAddress]) -> None:
        self._v4 = [str(vip.ip.ip) for vip in vips if vip.ip.version == 4]
        self._v6 = [str(vip.ip.ip) for vip in vips if vip.ip.version == 6]

    def install(self) -> None:
        """Make the tables; what is let through at this moment stays (the agent may have been restarted)."""
        lines = []
        for family in ("inet", "arp"):
            lines += [
                f"add table {family} {TABLE}",
                f"add set {family} {TABLE} lit4 {{ type ipv4_addr; flags timeout; }}",
                f"add chain {family} {TABLE} inward {{ type filter hook input priority 0; }}",
                f"add chain {family} {TABLE} outward {{ type filter hook output priority 0; }}",
                f"flush chain {family} {TABLE} inward",
                f"flush chain {family} {TABLE} outward",
            ]
        lines.append(f"add set inet {TABLE} lit6 {{ type ipv6_addr; flags timeout; }}")
        for address in self._v4:
            lines += [
                f"add rule inet {TABLE} inward ip daddr {address} ip daddr != @lit4 drop",
                f"add rule inet {TABLE} outward ip saddr {address} ip saddr != @lit4 drop",
                f"add rule arp {TABLE} inward arp daddr ip {address} arp daddr ip != @lit4 drop",
                f"add rule arp {TABLE} outward arp saddr ip {address} arp saddr ip != @lit4 drop",
            ]
        for address in self._v6:
            lines += [
                f"add rule inet {TABLE} inward ip6 daddr {address} ip6 daddr != @lit6 drop",
                f"add rule inet {TABLE} outward ip6 saddr {address} ip6 saddr != @lit6 drop",
            ]
        _nft(lines)

    def light(self, seconds: float) -> None:
        """Let the addresses through for `seconds` from now."""
        timeout = f"{max(1, int(seconds * 1000))}ms"
        # In one transaction: an element's time is only set when it is added anew.
        lit = [f"add element {place} {{ {address} timeout {timeout} }}" for place, address in self._elements()]
        _nft([*self._out(), *lit])

    def darken(self) -> None:
        _nft(self._out())

    def _elements(self) -> list[tuple[str, str]]:
        v4 = [(f"{family} {TABLE} lit4", address) for family in ("inet", "arp") for address in self._v4]
        return v4 + [(f"inet {TABLE} lit6", address) for address in self._v6]

    def _out(self) -> list[str]:
        """Take the addresses out of the sets, where only what is in can be deleted."""
        return [
            f"{verb} element {place} {{ {address} }}"
            for place, address in self._elements()
            for verb in ("add", "delete")
        ]

    def remove(self) -> None:
        _nft([f"delete table {family} {TABLE}" for family in ("inet", "arp")])


def _nft(lines: Sequence[str]) -> None:
    if not lines:
        return
    try:
        done = subprocess.run(
            ["nft", "-f", "-"], input="\n".join(lines), capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FenceFailed(f"nft: {error}") from error
    if done.returncode:
        raise FenceFailed(f"nft: {done.stderr.strip()[:300]}")
