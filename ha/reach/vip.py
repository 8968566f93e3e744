"""Virtual addresses: added and removed over netlink. An address is given a lifetime, so that the kernel takes it away
should nobody refresh it: the second line of defence behind the fence.
"""

import math
import socket
from collections.abc import Sequence

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from conf.settings import VirtualAddress
from ha.reach.neighbours import Interface

LIFETIME_SLACK_S = 5  # the kernel looks at lifetimes now and then; the fence is exact
EADDRNOTAVAIL = 99
IFA_F_NODAD = 0x02  # at once; who else has the address was found out before


class NoInterface(Exception):
    """No interface of this node is in the address's subnet, or the named one isn't there."""


def add(vips: Sequence[VirtualAddress], seconds: float) -> None:
    """Have the addresses for `seconds`; repeat to refresh. Raises NoInterface or OSError."""
    lifetime = math.ceil(seconds) + LIFETIME_SLACK_S
    with IPRoute() as route:
        for vip in vips:
            given = {"preferred_lft": lifetime, "valid_lft": lifetime}
            if vip.ip.version == 6:
                given["flags"] = IFA_F_NODAD
            index, prefix = _index(route, vip), vip.ip.network.prefixlen
            try:
                route.addr("replace", index=index, address=str(vip.ip.ip), prefixlen=prefix, **given)
            except NetlinkError as error:
                raise OSError(error.code, f"{vip.address}: {error}") from error


def remove(vips: Sequence[VirtualAddress]) -> None:
    """Raises OSError."""
    with IPRoute() as route:
        for vip in vips:
            for message in route.get_addr(address=str(vip.ip.ip)):
                prefix = message["prefixlen"]
                try:
                    route.addr("del", index=message["index"], address=str(vip.ip.ip), prefixlen=prefix)
                except NetlinkError as error:
                    if error.code != EADDRNOTAVAIL:  # its lifetime ended meanwhile
                        raise OSError(error.code, str(error)) from error


def interface_of(vip: VirtualAddress) -> Interface:
    """Where the address belongs on this node. Raises NoInterface."""
    with IPRoute() as route:
        index = _index(route, vip)
        message = route.get_links(index)[0]
        mac = bytes.fromhex(message.get_attr("IFLA_ADDRESS").replace(":", ""))
        return Interface(index, message.get_attr("IFLA_IFNAME"), mac)


def own_macs() -> frozenset[bytes]:
    """Of all interfaces: another one in the same segment may answer for an address of this node."""
    with IPRoute() as route:
        texts = [message.get_attr("IFLA_ADDRESS") or "" for message in route.get_links()]
    return frozenset(bytes.fromhex(text.replace(":", "")) for text in texts)


def _index(route: IPRoute, vip: VirtualAddress) -> int:
    if vip.interface:
        found = route.link_lookup(ifname=vip.interface)
        if not found:
            raise NoInterface(f"there is no interface {vip.interface} for {vip.address}")
        return int(found[0])
    family = socket.AF_INET if vip.ip.version == 4 else socket.AF_INET6
    for message in route.get_addr(family=family):
        own = type(vip.ip.ip)(message.get_attr("IFA_ADDRESS"))
        if own in vip.ip.network and own != vip.ip.ip:
            return int(message["index"])
    raise NoInterface(f"no interface of this node is in {vip.ip.network}; is its own address up?")
