"""Who answers for an address on the wire: announcements, probes, and foreign claims. ARP for IPv4, neighbour
discovery for IPv6. Sources: RFC 5227 (address conflict detection), RFC 4861 7.2, RFC 4862 5.4.2.
"""

import contextlib
import ipaddress
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

ETH_ARP: Final = 0x0806
ETH_IPV4: Final = 0x0800
BROADCAST: Final = b"\xff" * 6
ARP_REQUEST: Final = 1
NEIGHBOUR_SOLICITATION: Final = 135
NEIGHBOUR_ADVERTISEMENT: Final = 136
OVERRIDE: Final = 0x20000000
FRAME_BYTES_MAX: Final = 2048

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Interface:
    index: int
    name: str
    mac: bytes


def announce(interface: Interface, address: Address) -> None:
    """Tell the segment that the address is here now. Raises OSError."""
    if address.version == 4:
        # Request and reply form: some hosts learn from the one, some from the other (RFC 5227 3).
        _send_arp(interface, 1, address.packed, address.packed)
        _send_arp(interface, 2, address.packed, address.packed)
    else:
        option = struct.pack("!BB", 2, 1) + interface.mac
        message = struct.pack("!BBHL", NEIGHBOUR_ADVERTISEMENT, 0, 0, OVERRIDE) + address.packed + option
        _send_icmp6(interface, message, "ff02::1")


def ask(interface: Interface, address: Address) -> None:
    """Probe: whoever has the address answers. Raises OSError."""
    if address.version == 4:
        _send_arp(interface, ARP_REQUEST, bytes(4), address.packed)
    else:
        group = ipaddress.IPv6Address(b"\xff\x02" + bytes(9) + b"\x01\xff" + address.packed[13:])
        option = struct.pack("!BB", 1, 1) + interface.mac
        message = struct.pack("!BBHL", NEIGHBOUR_SOLICITATION, 0, 0, 0) + address.packed + option
        _send_icmp6(interface, message, str(group))


def _send_arp(interface: Interface, operation: int, sender: bytes, target: bytes) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((interface.name, ETH_ARP))
        header = struct.pack("!HHBBH", 1, ETH_IPV4, 6, 4, operation)
        arp = header + interface.mac + sender + (BROADCAST if sender == target else bytes(6)) + target
        raw.send(BROADCAST + interface.mac + struct.pack("!H", ETH_ARP) + arp)


def _send_icmp6(interface: Interface, message: bytes, to: str) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as raw:
        raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, interface.index)
        raw.sendto(message, (to, 0, 0, interface.index))


class Listener:
    """Claims to addresses, seen on the wire of this node: (address, MAC) of whoever says that it has it."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._arp = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_ARP))
        self._arp.setblocking(False)
        self._icmp6: socket.socket | None = None
        with contextlib.suppress(OSError):  # a kernel without IPv6
            self._icmp6 = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x86DD))
            self._icmp6.setblocking(False)

    def close(self) -> None:
        self._arp.close()
        if self._icmp6:
            self._icmp6.close()

    def claims(self) -> Iterator[tuple[Address, bytes]]:
        """All that came since the last call."""
        while frame := _take(self._arp):
            if claim := _arp_claim(frame):
                yield claim
        while self._icmp6 and (packet := _take(self._icmp6)):
            if found := _icmp6_claim(packet):
                yield found

    def foreign(self, own: frozenset[bytes], deadline: float) -> dict[Address, bytes]:
        """For each address that another MAC than `own` claims until `deadline` (time.monotonic()): that MAC."""
        found: dict[Address, bytes] = {}
        while True:
            found |= {address: mac for address, mac in self.claims() if mac not in own}
            left = deadline - time.monotonic()
            if left <= 0:
                return found
            select.select([one for one in (self._arp, self._icmp6) if one], [], [], left)


def _take(listening: socket.socket) -> bytes:
    try:
        return listening.recv(FRAME_BYTES_MAX)
    except OSError:
        return b""


def _arp_claim(frame: bytes) -> tuple[Address, bytes] | None:
    if len(frame) < 42 or frame[12:14] != struct.pack("!H", ETH_ARP) or frame[14:20] != b"\x00\x01\x08\x00\x06\x04":
        return None
    mac, sender = frame[22:28], frame[28:32]
    return (ipaddress.IPv4Address(sender), mac) if any(sender) else None


def _icmp6_claim(packet: bytes) -> tuple[Address, bytes] | None:
    """A neighbour advertisement with the link-layer address of its target."""
    if len(packet) < 72 or packet[6] != socket.IPPROTO_ICMPV6 or packet[40] != NEIGHBOUR_ADVERTISEMENT:
        return None
    if packet[64:66] != b"\x02\x01":
        return None
    return ipaddress.IPv6Address(packet[48:64]), packet[66:72]
