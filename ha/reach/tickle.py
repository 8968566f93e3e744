"""TCP connections to the virtual addresses: listed where they are, and shaken loose after a takeover.

A client whose server has vanished would wait for minutes. An ACK that fits none of its sequence numbers makes it answer
with an ACK of its own (RFC 9293 3.10.7.4), which the new node, knowing no such connection, answers with a reset that
fits: the client notices at once and connects again. The method is CTDB's.
"""

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

# Linux's states in which a client may wait for us: established, its last ACK of the opening not seen, our end not seen.
WAITED_FOR: Final = {"01", "03", "04", "08", "09", "0B"}
ACK: Final = 0x10
CONNECTIONS_MAX: Final = 4096

Connection = tuple[str, int, str, int]  # client's address and port, our address and port


def connections_to(addresses: Iterable[str], proc: Path = Path("/proc/self/net")) -> tuple[Connection, ...]:
    """TCP connections to these addresses of this node whose clients may still expect something."""
    wanted = set(addresses)
    found: list[Connection] = []
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] not in WAITED_FOR:
                continue
            (ours, our_port), (theirs, their_port) = _endpoint(fields[1]), _endpoint(fields[2])
            if ours in wanted:
                found.append((theirs, their_port, ours, our_port))
    return tuple(sorted(found)[:CONNECTIONS_MAX])


def _endpoint(text: str) -> tuple[str, int]:
    """proc(5), /proc/net/tcp: words of the address in this machine's byte order."""
    address, _, port = text.partition(":")
    raw = bytes.fromhex(address)
    packed = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    ip = ipaddress.ip_address(packed)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped or ip), int(port, 16)


def tickle(connections: Sequence[Connection]) -> None:
    """Send each client an ACK in our name. The addresses must be here. Raises OSError when none could be sent."""
    sent, last = 0, OSError(0, "nothing to send")
    for theirs, their_port, ours, our_port in connections:
        family = socket.AF_INET6 if ":" in ours else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
                raw.bind((ours, 0))
                with contextlib.suppress(BlockingIOError):
                    raw.sendto(_ack(ours, our_port, theirs, their_port), (theirs, 0))
            sent += 1
        except OSError as error:
            last = error
    if connections and not sent:
        raise last


def _ack(ours: str, our_port: int, theirs: str, their_port: int) -> bytes:
    """A TCP header with sequence numbers that fit nothing (RFC 9293 3.1)."""
    header = struct.pack("!HHLLBBHHH", our_port, their_port, 0, 0, 5 << 4, ACK, 1024, 0, 0)
    addresses = ipaddress.ip_address(ours).packed + ipaddress.ip_address(theirs).packed
    summed = addresses + struct.pack("!HH", socket.IPPROTO_TCP, len(header)) + header  # both versions' pseudo headers
    total = sum(word for (word,) in struct.iter_unpack("!H", summed))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return header[:16] + struct.pack("!H", ~total & 0xFFFF) + header[18:]
