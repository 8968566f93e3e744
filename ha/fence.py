"""The fence: an nftables set, in the kernel, whose elements run out unless they are refreshed.

Packets for a virtual address, and ARP for it, pass only while the address is in the set. So a node whose processes are
stopped falls silent by itself when its lease has run out, while its kernel would otherwise go on answering.
"""

import ipaddress
import subprocess
from collections.abc import Sequence

TABLE = "tandem_fence"
COMMAND_TIMEOUT_S = 10.0


class FenceFailed(Exception):
    """nft didn't do it; without the fence the address must not be taken."""


class Fence:
    def __init__(self, vips: Sequence[str]) -> None:
        addresses = [ipaddress.ip_interface(vip).ip for vip in vips]
        self._v4 = [str(address) for address in addresses if address.version == 4]
        self._v6 = [str(address) for address in addresses if address.version == 6]

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
        lines = []
        for family, name, addresses in (
            ("inet", "lit4", self._v4),
            ("arp", "lit4", self._v4),
            ("inet", "lit6", self._v6),
        ):
            for address in addresses:
                # In one transaction: an element's time is only set when it is added anew.
                lines += [
                    f"add element {family} {TABLE} {name} {{ {address} }}",
                    f"delete element {family} {TABLE} {name} {{ {address} }}",
                    f"add element {family} {TABLE} {name} {{ {address} timeout {timeout} }}",
                ]
        _nft(lines)

    def darken(self) -> None:
        lines = [f"flush set {family} {TABLE} lit4" for family in ("inet", "arp")]
        _nft([*lines, f"flush set inet {TABLE} lit6"])

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
