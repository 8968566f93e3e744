"""The small parts that make clients reach a node: what is seen on the wire, whom to tickle, the watchdog."""

import ipaddress
import socket
from pathlib import Path

from conf.settings import VirtualAddress
from ha.reach.neighbours import _arp_claim, _icmp6_claim
from ha.reach.tickle import _ack, connections_to
from ha.reach.watchdog import Watchdog

MAC = bytes.fromhex("020000000001")


def arp(sender: str, operation: int = 2) -> bytes:
    header = b"\xff" * 6 + MAC + b"\x08\x06"
    body = b"\x00\x01\x08\x00\x06\x04" + operation.to_bytes(2, "big")
    return header + body + MAC + ipaddress.ip_address(sender).packed + bytes(10)


def test_claims_in_arp() -> None:
    assert _arp_claim(arp("10.0.0.5")) == (ipaddress.ip_address("10.0.0.5"), MAC)
    assert _arp_claim(arp("10.0.0.5", 1)) == (ipaddress.ip_address("10.0.0.5"), MAC)  # an announcement
    assert _arp_claim(arp("0.0.0.0", 1)) is None  # a probe claims nothing
    for length in range(42):
        assert _arp_claim(arp("10.0.0.5")[:length]) is None
    assert _arp_claim(b"\x00" * 60) is None


def test_claims_in_neighbour_discovery() -> None:
    target = ipaddress.ip_address("fd00::5")
    advertisement = bytes((136, 0, 0, 0)) + bytes(4) + target.packed + b"\x02\x01" + MAC
    packet = b"\x60" + bytes(3) + len(advertisement).to_bytes(2, "big") + bytes((58, 255)) + bytes(32) + advertisement
    assert _icmp6_claim(packet) == (target, MAC)
    for length in range(len(packet)):
        assert _icmp6_claim(packet[:length]) is None
    assert _icmp6_claim(packet[:40] + b"\x87" + packet[41:]) is None  # a solicitation


def test_connections_are_read_from_the_kernel(tmp_path: Path) -> None:
    """Real ones, over IPv4 and over IPv6; listening sockets and other addresses don't count."""
    pairs = []
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.create_server((address, 0), family=family) as listening:
            client = socket.create_connection(listening.getsockname()[:2])
            server, _ = listening.accept()
            pairs.append((client, server))
    try:
        found = connections_to(["127.0.0.1", "::1"])
        for client, server in pairs:
            assert (*client.getsockname()[:2], *server.getsockname()[:2]) in found
        assert connections_to(["192.0.2.1"]) == ()
        client, server = pairs[0]
        client.shutdown(socket.SHUT_WR)  # and waits for an answer
        assert (*client.getsockname()[:2], *server.getsockname()[:2]) in connections_to(["127.0.0.1"])
    finally:
        for pair in pairs:
            for one in pair:
                one.close()
    assert connections_to(["127.0.0.1"], tmp_path) == ()  # a kernel that doesn't tell


def test_a_tickle_has_a_good_checksum() -> None:
    for ours, theirs in (("10.0.0.5", "10.0.0.9"), ("fd00::5", "fd00::9")):
        segment = _ack(ours, 104, theirs, 40000)
        addresses = ipaddress.ip_address(ours).packed + ipaddress.ip_address(theirs).packed
        summed = addresses + bytes((0, 6, 0, len(segment))) + segment
        total = sum(int.from_bytes(summed[at : at + 2], "big") for at in range(0, len(summed), 2))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        assert total == 0xFFFF
        assert segment[13] == 0x10


def test_watchdog_is_fed_and_disarmed(tmp_path: Path) -> None:
    device = tmp_path / "watchdog"
    device.touch()
    watchdog = Watchdog(str(device), 3.0)
    watchdog.disarm()
    assert device.read_bytes() == b"V"  # an agent before this one may have left it armed
    device.write_bytes(b"")
    watchdog.disarm()
    assert device.read_bytes() == b""
    watchdog.feed()
    watchdog.feed()
    assert device.read_bytes() == b"\0\0"
    watchdog.disarm()
    assert device.read_bytes() == b"\0\0V"


def test_no_watchdog_is_no_reason_not_to_serve(tmp_path: Path) -> None:
    for path in ("", str(tmp_path / "none" / "watchdog")):
        watchdog = Watchdog(path, 3.0)
        watchdog.feed()
        watchdog.feed()
        watchdog.disarm()


def test_virtual_address_settings() -> None:
    assert str(VirtualAddress(address="fd00::5/64").ip.network) == "fd00::/64"
