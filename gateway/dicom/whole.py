"""Does a data set end where its last element does?"""

import zlib
from typing import Final

from gateway.dicom.scan import Scanner
from gateway.dicom.sop_classes import encoding_of

NEVER_FOUND: Final = frozenset({0xFFFF_FFFF})  # so all of it is looked through
PADDING_BYTES: Final = 8
INFLATED_BYTES: Final = 1 << 20  # at once


class Whole:
    """Looks at a data set from its first byte to its last."""

    def __init__(self, transfer_syntax: str) -> None:
        implicit, little, deflated = encoding_of(transfer_syntax)
        self._scanner = Scanner((), NEVER_FOUND, 0, implicit=implicit, little=little)
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS) if deflated else None
        self._last = b""
        self._broken = False

    def feed(self, data: bytes) -> None:
        if self._inflater is None:
            self._seen(data)
            return
        try:
            while data and not self._broken:
                self._seen(self._inflater.decompress(data, INFLATED_BYTES))
                data = self._inflater.unconsumed_tail
        except zlib.error:
            self._broken = True

    def _seen(self, data: bytes) -> None:
        self._last = data[-PADDING_BYTES:] or self._last
        self._scanner.feed(memoryview(data))

    @property
    def cut_short(self) -> bool:
        """It ends in the middle of an element: whoever copied it was cut off. False for what can't be told."""
        if self._broken or (self._inflater is not None and not self._inflater.eof):
            return True
        scanner, padded = self._scanner, not any(self._last)  # behind the data set, perhaps
        return not scanner.why and (scanner.in_value or not (scanner.at_rest or padded))
