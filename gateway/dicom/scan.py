"""A quick scan of the head of a data set for wanted elements (PS3.5 7), a tenth of the cost of a full parse.

It knows the plain encodings. Whatever looks odd makes it give up, and the caller parses the data set with pydicom.
"""

import struct
from collections.abc import Container
from typing import Final

LONG_VRS: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
SHORT_VRS: Final = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
UNDEFINED: Final = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
DEPTH_MAX: Final = 16


class GiveUp(Exception):
    """Something odd; or the buffer ends before the scan does."""


class Scanner:
    def __init__(self, data: bytes | bytearray | memoryview, *, implicit: bool, little: bool) -> None:
        self._data, self._implicit = data, implicit
        order = "<" if little else ">"
        self._tag = struct.Struct(f"{order}HH").unpack_from
        self._long = struct.Struct(f"{order}L").unpack_from
        self._short = struct.Struct(f"{order}H").unpack_from
        self._size = len(data)

    def find(self, wanted: Container[int], last_tag: int) -> dict[int, tuple[bytes, bytes]]:
        """tag -> (VR or b"", value) of the wanted elements up to `last_tag`, or to the end. Raises GiveUp."""
        found: dict[int, tuple[bytes, bytes]] = {}
        at, before = 0, -1
        while at < self._size:
            tag, vr, length, value_at = self._element(at)
            if tag > last_tag:
                return found
            if tag <= before:
                raise GiveUp
            before = tag
            if length == UNDEFINED:
                at = self._skip_items(value_at, 0)
                continue
            at = value_at + length
            if at > self._size:
                raise GiveUp
            if tag in wanted:
                found[tag] = (vr, bytes(self._data[value_at:at]))
        if at != self._size:
            raise GiveUp
        return found

    def _element(self, at: int) -> tuple[int, bytes, int, int]:
        """(tag, VR, length, where the value begins)."""
        if at + 8 > self._size:
            raise GiveUp
        group, element = self._tag(self._data, at)
        tag = group << 16 | element
        if self._implicit or group == 0xFFFE:
            return tag, b"", self._long(self._data, at + 4)[0], at + 8
        vr = bytes(self._data[at + 4 : at + 6])
        if vr in SHORT_VRS:
            return tag, vr, self._short(self._data, at + 6)[0], at + 8
        if vr not in LONG_VRS or at + 12 > self._size:
            raise GiveUp
        length = self._long(self._data, at + 8)[0]
        if vr == b"UN" and length == UNDEFINED:
            raise GiveUp  # its content is implicit VR (PS3.5 6.2.2)
        return tag, vr, length, at + 12

    def _skip_items(self, at: int, depth: int) -> int:
        """Where a sequence of undefined length ends."""
        if depth > DEPTH_MAX:
            raise GiveUp
        while True:
            tag, _, length, at = self._element(at)
            if tag == SEQUENCE_END:
                return at
            if tag != ITEM:
                raise GiveUp
            at = self._skip_item(at, depth) if length == UNDEFINED else at + length

    def _skip_item(self, at: int, depth: int) -> int:
        while True:
            tag, _, length, at = self._element(at)
            if tag == ITEM_END:
                return at
            at = self._skip_items(at, depth + 1) if length == UNDEFINED else at + length
