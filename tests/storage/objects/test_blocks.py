"""Digests of blocks: however the bytes come, and whichever part is looked at."""

import random

import pytest
import xxhash

from storage.objects.blocks import BLOCK_BYTES, DIGEST_BYTES, BlockDigests, are_good

LENGTHS = (1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 12345)


@pytest.mark.parametrize("length", LENGTHS)
def test_it_does_not_matter_how_the_bytes_come(length: int) -> None:
    rng = random.Random(length)
    data = rng.randbytes(length)
    wanted = b"".join(xxhash.xxh3_128_digest(data[at : at + BLOCK_BYTES]) for at in range(0, length, BLOCK_BYTES))
    found, at = BlockDigests(), 0
    while at < length:
        step = rng.choice((1, 1000, 65536, BLOCK_BYTES, 2 * BLOCK_BYTES + 7))
        found.update(memoryview(data)[at : at + step])
        at += step
    assert found.digests() == wanted
    assert len(wanted) == -(-length // BLOCK_BYTES) * DIGEST_BYTES
    assert are_good(wanted, 0, data)


def test_each_part_is_checked_by_itself() -> None:
    data = random.Random(1).randbytes(4 * BLOCK_BYTES + 100)
    digests = BlockDigests()
    digests.update(data)
    blocks = digests.digests()
    bad = bytearray(data)
    bad[2 * BLOCK_BYTES + 5] ^= 1
    for number in range(5):
        at = number * BLOCK_BYTES
        assert are_good(blocks, at, data[at : at + BLOCK_BYTES])
        assert are_good(blocks, at, bytes(bad[at : at + BLOCK_BYTES])) == (number != 2)
    assert not are_good(blocks, 0, bytes(bad))
    assert not are_good(blocks, BLOCK_BYTES, data[:BLOCK_BYTES])
    assert not are_good(blocks, 4 * BLOCK_BYTES, data[4 * BLOCK_BYTES : -1])
    assert not are_good(blocks, 5 * BLOCK_BYTES, b"more")
    assert not are_good(blocks, 0, b"")
