"""Virtual addresses: added and removed over netlink, announced by gratuitous ARP or neighbour advertisement.

An address is given a lifetime as well, so that the kernel takes it away should nobody refresh it: the second line of
defence behind the fence.
"""

import ipaddress
import math
import socket
import struct
from collections.abc import Sequence

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

ETH_ARP, ETH_IPV4 = 0x0806, 0x0800
LIFETIME_SLACK_S = 5  # the kernel looks at lifetimes now and then; the fence is exact
BROADCAST = b"\xff" * 6
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


class NoInterface(Exception):
    """No interface of this node is in the address's subnet."""


class VirtualAddresses:
    def __init__(self, vips: Sequence[str]) -> None:
        self._vips: list[Interface] = [ipaddress.ip_interface(vip) for vip in vips]

    def add(self, seconds: float) -> None:
        """Have the addresses for `seconds`; repeat to refresh. Raises NoInterface or OSError."""
        lifetime = math.ceil(seconds) + LIFETIME_SLACK_S
        with IPRoute() as route:
            for vip in self._vips:
                try:
                    route.addr(
                        "replace",
                        index=self._index(route, vip),
                        address=str(vip.ip),
                        prefixlen=vip.network.prefixlen,
                        preferred_lft=lifetime,
                        valid_lft=lifetime,
                    )
                except NetlinkError as error:
                    raise OSError(error.code, str(error)) from error

    def remove(self) -> None:
        with IPRoute() as route:
            for vip in self._vips:
                for message in route.get_addr(address=str(vip.ip)):
                    try:
                        route.addr("del", index=message["index"], address=str(vip.ip), prefixlen=message["prefixlen"])
                    except NetlinkError as error:
                        if error.code != 99:  # EADDRNOTAVAIL: its lifetime ended meanwhile
                            raise OSError(error.code, str(error)) from error

    def announce(self) -> None:
        """Tell the segment where the addresses are now."""
        with IPRoute() as route:
            for vip in self._vips:
                index = self._index(route, vip)
                name, mac = _link(route, index)
                if vip.version == 4:
                    _send_arp(name, mac, vip.ip.packed)
                else:
                    _send_advertisement(index, mac, vip.ip.packed)

    def _index(self, route: IPRoute, vip: Interface) -> int:
        family = socket.AF_INET if vip.version == 4 else socket.AF_INET6
        for message in route.get_addr(family=family):
            own = ipaddress.ip_address(message.get_attr("IFA_ADDRESS"))
            if own in vip.network and own != vip.ip:
                index: int = message["index"]
                return index
        raise NoInterface(f"no interface of this node is in {vip.network}; is its own address up?")


def _link(route: IPRoute, index: int) -> tuple[str, bytes]:
    message = route.get_links(index)[0]
    return message.get_attr("IFLA_IFNAME"), bytes.fromhex(message.get_attr("IFLA_ADDRESS").replace(":", ""))


def _send_arp(interface: str, mac: bytes, address: bytes) -> None:
    """Request and reply form: some hosts learn from the one, some from the other (RFC 5227 3)."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((interface, ETH_ARP))
        for operation in (1, 2):
            arp = struct.pack("!HHBBH", 1, ETH_IPV4, 6, 4, operation) + mac + address + BROADCAST + address
            raw.send(BROADCAST + mac + struct.pack("!H", ETH_ARP) + arp)


def _send_advertisement(index: int, mac: bytes, address: bytes) -> None:
    """Unsolicited neighbour advertisement with the override flag, to all nodes (RFC 4861 7.2.6)."""
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as raw:
        raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        message = struct.pack("!BBHL", 136, 0, 0, 0x20000000) + address + struct.pack("!BB", 2, 1) + mac
        raw.sendto(message, ("ff02::1", 0, 0, index))
