"""Frames from the peer: whatever comes, it is a frame, or the link ends."""

import asyncio
import struct
from pathlib import Path

import msgspec
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.objects.local_volume import create_marker
from storage.objects.lookups import Lookups
from storage.objects.volumes import Volumes
from storage.replication.link import HEADER, MAGIC, PAYLOAD_BYTES_MAX, Kind, Link
from storage.replication.messages import Deny, encode
from storage.replication.peering import FETCH_STREAM_BIT, Peering
from storage.state.catalogue import Catalogue
from storage.workers import Workers
from tests.conftest import FUZZ
from tests.simulation.machine import MemoryKv

Frame = tuple[Kind, int, bytes]


class Transport(asyncio.Transport):
    """Takes what is sent and notes whether it was ended."""

    def __init__(self, encrypted: bool = False) -> None:
        super().__init__({"ssl_object": object()} if encrypted else {})
        self.sent = bytearray()
        self.ended = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def writelines(self, list_of_data: object) -> None:
        for data in list_of_data:  # type: ignore[attr-defined]
            self.sent += data

    def is_closing(self) -> bool:
        return self.ended

    def abort(self) -> None:
        self.ended = True


def frame(kind: int, stream: int, payload: bytes, checksum: int | None = None) -> bytes:
    checksum = xxhash.xxh3_64_intdigest(payload) if checksum is None else checksum
    return HEADER.pack(MAGIC, kind, len(payload), stream, checksum) + payload


async def received(raw: bytes, sizes: list[int], encrypted: bool = False) -> tuple[list[Frame], Link]:
    """What a link makes of bytes that come in pieces of these sizes."""
    found: list[Frame] = []
    link = Link(
        lambda _: None, lambda _, kind, stream, payload: found.append((kind, stream, bytes(payload))), lambda _: None
    )
    link.connection_made(Transport(encrypted))
    give(link, raw, sizes)
    return found, link


def give(link: Link, raw: bytes, sizes: list[int]) -> None:
    at, turn = 0, 0
    while at < len(raw) and not link.closing:
        buffer = link.get_buffer(-1)
        count = min(len(buffer), len(raw) - at, sizes[turn % len(sizes)] if sizes else len(raw))
        buffer[:count] = raw[at : at + count]
        link.buffer_updated(count)
        at, turn = at + count, turn + 1


kinds = st.sampled_from(list(Kind))
streams = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1), st.just(FETCH_STREAM_BIT | 1))
payloads = st.one_of(
    st.binary(max_size=200),
    st.integers(0, 2**64 - 1).map(lambda number: number.to_bytes(8, "big")),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5) | st.binary(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    ).map(msgspec.msgpack.encode),
    st.just(encode(Deny(3))),
)
frames = st.lists(st.tuples(kinds, streams, payloads), max_size=8)
sizes = st.lists(st.integers(1, 100), max_size=5)


@given(frames, sizes)
@settings(max_examples=300 * FUZZ, deadline=None)
def test_frames_arrive_whole_however_they_are_cut(sent: list[Frame], cut: list[int]) -> None:
    raw = b"".join(frame(*one) for one in sent)
    found, link = asyncio.run(received(raw, cut))
    assert found == sent
    assert not link.closing


@given(st.binary(max_size=300), sizes)
@settings(max_examples=300 * FUZZ, deadline=None)
def test_anything_else_ends_the_link(raw: bytes, cut: list[int]) -> None:
    found, link = asyncio.run(received(raw, cut))
    assert found == []
    assert link.closing or len(raw) < HEADER.size or raw[:2] == MAGIC


@given(frames.filter(bool), st.data())
@settings(max_examples=300 * FUZZ, deadline=None)
def test_a_damaged_frame_is_not_taken(sent: list[Frame], data: st.DataObject) -> None:
    raw = bytearray(b"".join(frame(*one) for one in sent))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    found, link = asyncio.run(received(bytes(raw), []))
    same = sum(one == other for one, other in zip(found, sent, strict=False))
    # Kind and stream have no checksum: TCP's has to do for them. Payloads have.
    assert link.closing or same >= len(found) - 1
    assert all(payload in {one[2] for one in sent} for _, _, payload in found)


def test_a_frame_that_is_too_long_ends_the_link() -> None:
    raw = struct.pack(">2sBxIQQ", MAGIC, Kind.CHUNK, PAYLOAD_BYTES_MAX + 1, 1, 0)
    _, link = asyncio.run(received(raw, []))
    assert link.closing


@given(frames)
@settings(max_examples=300 * FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_peer_that_talks_nonsense_ends_its_link_and_nothing_else(tmp_path: Path, sent: list[Frame]) -> None:
    folder = tmp_path / "disk"
    if not folder.exists():
        create_marker(folder)
    assert asyncio.run(_answered(folder, sent)) == []


async def _answered(folder: Path, sent: list[Frame]) -> list[dict[str, object]]:
    """What the loop's handler of exceptions was told while these frames came."""
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    volumes, workers = Volumes([folder], 0), Workers(1, "test")
    peering = Peering(
        dial=False,
        networks=(),
        volumes=volumes,
        workers=workers,
        find=lambda seq: None,
        lacks=lambda seq: bool(seq % 2),
        list_copies=lambda start, read, only: [],
        on_up=lambda: None,
        on_down=lambda why: None,
        on_message=lambda message: None,
        on_suspect=lambda seq: None,
        lookups=Lookups(Catalogue(MemoryKv()), volumes, workers, 30.0),
        from_log=lambda seq: None,
        look=lambda seq: None,
    )
    link = Link(peering._up, peering._frame, peering._down)
    try:
        link.connection_made(Transport())
        give(link, b"".join(frame(*one) for one in sent), [])
        while peering._tasks:
            await asyncio.wait(list(peering._tasks))
        if link.closing:
            link.connection_lost(None)
        await peering.stop()
        while peering._tasks:
            await asyncio.wait(list(peering._tasks))
    finally:
        workers.stop()
        volumes.close()
    assert list((folder / "spool").iterdir()) == []
    return told


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("taken", [False, True])
async def test_only_tls_takes_the_place_of_checksums(encrypted: bool, taken: bool) -> None:
    """And only where the other node knows that."""
    link = Link(lambda _: None, lambda *_: None, lambda _: None)
    transport = Transport(encrypted)
    link.connection_made(transport)
    link.plain_frames = taken
    link.send(Kind.CHUNK, 7, b"some bytes")
    await asyncio.sleep(0)
    plain = encrypted and taken
    assert HEADER.unpack_from(transport.sent)[-1] == (0 if plain else xxhash.xxh3_64_intdigest(b"some bytes"))
    found, other = await received(bytes(transport.sent), [], encrypted)
    assert (found, other.closing) == ([(Kind.CHUNK, 7, b"some bytes")], False)
    if plain:
        found, other = await received(bytes(transport.sent), [])
        assert (found, other.closing) == ([], True)
