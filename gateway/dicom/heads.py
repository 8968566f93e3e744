"""The attributes of a stored file but for its pixels, from its first bytes."""

import zlib
from io import BytesIO
from typing import Final

from pydicom import Dataset
from pydicom.filereader import read_dataset

from gateway.dicom.scan import Scanner
from gateway.dicom.sop_classes import encoding_of

HEAD_BYTES_MAX: Final = 4 << 20  # read, and inflated
HEAD_BYTES_USUAL: Final = 32 << 10
LAST: Final = 0x7FE00007
PIXELS: Final = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))


def is_whole(raw: bytes, offset: int, transfer_syntax: str) -> bool:
    """The beginning of a file goes as far as its pixels; False also where that can't be told at a glance."""
    implicit, little, deflated = encoding_of(transfer_syntax)
    if deflated:
        return False
    scanner = Scanner((), frozenset(), LAST, implicit=implicit, little=little)
    scanner.feed(memoryview(raw)[offset:])
    return scanner.done


def read_head(raw: bytes, offset: int, transfer_syntax: str) -> Dataset | None:
    """`raw`: the beginning of a file, whose data set is at `offset`. None if it can't be read. Blocks."""
    implicit, little, deflated = encoding_of(transfer_syntax)
    try:
        data = raw[offset:]
        if deflated:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, HEAD_BYTES_MAX)
        return read_dataset(
            BytesIO(data),
            implicit,
            little,
            stop_when=lambda tag, vr, length: int(tag) in PIXELS,
            defer_size=None,
        )
    except Exception:  # pydicom raises whatever a strange data set leads it to; then it has no such attributes
        return None
