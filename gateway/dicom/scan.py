"""Finds wanted elements of a data set (PS3.5 7) as its bytes come in, and steps over all others.

Nothing is recursive: nested sequences of any depth cost one number each, and the work is bounded by a count of
elements. Whatever is odd ends the scan with `GiveUp`; the caller then has the data set parsed where that may take its
time.
"""

import struct
from collections.abc import Container
from typing import Final

LONG_VRS: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
SHORT_VRS: Final = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
UNDEFINED: Final = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
VALUE_BYTES_MAX: Final = 4096  # of a wanted value; what is longer is cut there
DEPTH_MAX: Final = 100_000
HEADER_BYTES_MAX: Final = 12


class GiveUp(Exception):
    """Something odd, or more elements than this scan may look at."""


class Scanner:
    """`found`: tag -> (VR or b"", value) of the first element with each wanted tag."""

    def __init__(
        self,
        wanted: Container[int],
        needed: frozenset[int],
        last_tag: int,
        *,
        implicit: bool,
        little: bool,
        elements_max: int = 1 << 62,
    ) -> None:
        """The scan is `done` behind `last_tag` once all that is `needed` was found, in whatever order it came; else at
        the end of the data set."""
        self.found: dict[int, tuple[bytes, bytes]] = {}
        self.done = False
        self.why = ""  # why it was given up
        self._wanted, self._missing, self._last_tag = wanted, set(needed), last_tag
        self._implicit = implicit
        order = "<" if little else ">"
        self._tag = struct.Struct(f"{order}HH").unpack_from
        self._long = struct.Struct(f"{order}L").unpack_from
        self._short = struct.Struct(f"{order}H").unpack_from
        self._little = little
        self._elements_left = elements_max
        self._skip = 0
        self._carry = b""
        self._value: bytearray | None = None  # of the wanted element that is being read
        self._value_of = (0, b"")
        self._value_left = self._rest_of_value = 0
        # Open sequences and items of undefined length, innermost last: whether it is a sequence, and the way of
        # encoding that is in force again when it ends.
        self._open: list[tuple[bool, bool]] = []

    @property
    def over(self) -> bool:
        """Nothing more is looked at."""
        return self.done or bool(self.why)

    @property
    def at_rest(self) -> bool:
        """Everything up to here is whole."""
        return not (self._skip or self._carry or self._open or self._value is not None)

    @property
    def in_value(self) -> bool:
        """It has ended within the value of an element whose length it had said."""
        return bool(self._skip) or self._value is not None

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """The next piece of the data set."""
        if self.over:
            return
        view = memoryview(data)
        try:
            if self._carry:
                view = view[self._finish_header(view) :]
            self._feed(view)
        except GiveUp as error:
            self.why = str(error)

    def _finish_header(self, view: memoryview) -> int:
        """Take the header that began in the piece before; returns the bytes of `view` that belong to it."""
        before = len(self._carry)
        head = memoryview(self._carry + bytes(view[:HEADER_BYTES_MAX]))
        used = self._element(head, 0, len(head))
        if not used:
            self._carry = bytes(head)[: before + len(view)]
            return len(view)
        self._carry = b""
        return used - before

    def end(self) -> dict[int, tuple[bytes, bytes]]:
        """What was found, when the data set has ended or the scan is done. Raises GiveUp."""
        if self.why:
            raise GiveUp(self.why)
        if not self.done and not self.at_rest:
            raise GiveUp("it ends in the middle of an element")
        return self.found

    def _feed(self, data: memoryview) -> None:
        at, size = 0, len(data)
        while at < size and not self.done:
            if self._skip:
                step = min(self._skip, size - at)
                self._skip -= step
                at += step
            elif self._value is not None:
                step = min(self._value_left, size - at)
                self._value += data[at : at + step]
                self._value_left -= step
                at += step
                if not self._value_left:
                    self._value_complete(self._value)
            else:
                used = self._element(data, at, size)
                if not used:
                    self._carry = bytes(data[at:])
                    return
                at += used

    def _value_complete(self, value: bytearray) -> None:
        tag, vr = self._value_of
        self._value, self._skip = None, self._rest_of_value
        self.found.setdefault(tag, (vr, bytes(value)))
        self._missing.discard(tag)

    def _element(self, data: memoryview, at: int, size: int) -> int:
        """Take one header; returns its bytes, 0 if it isn't there as a whole. Raises GiveUp."""
        if size - at < 8:
            return 0
        group, element = self._tag(data, at)
        tag = group << 16 | element
        if group == 0xFFFE:
            self._delimiter(tag, self._long(data, at + 4)[0])
            self._count()
            return 8
        if self._open and self._open[-1][0]:
            raise GiveUp("an element where an item should be")
        if not self._open and tag > self._last_tag and not self._missing:
            self.done = True
            return 0
        vr, used = b"", 8
        if self._implicit:
            length = self._long(data, at + 4)[0]
        else:
            vr = bytes(data[at + 4 : at + 6])
            if vr in SHORT_VRS:
                length = self._short(data, at + 6)[0]
            elif vr in LONG_VRS:
                if size - at < HEADER_BYTES_MAX:
                    return 0
                length, used = self._long(data, at + 8)[0], HEADER_BYTES_MAX
            else:
                raise GiveUp("an element without a VR")
        self._count()
        self._begin(tag, vr, length)
        return used

    def _count(self) -> None:
        self._elements_left -= 1
        if self._elements_left < 0:
            raise GiveUp("too many elements to be looked at here")

    def _begin(self, tag: int, vr: bytes, length: int) -> None:
        if length == UNDEFINED:
            self._push(True)
            if vr == b"UN":  # its content is implicit VR little endian (PS3.5 6.2.2)
                if not self._little:
                    raise GiveUp("UN of undefined length in big endian")
                self._implicit = True
        elif not self._open and tag in self._wanted and tag not in self.found:
            self._value, self._value_of = bytearray(), (tag, vr)
            self._value_left = min(length, VALUE_BYTES_MAX)
            self._rest_of_value = length - self._value_left
            if not self._value_left:
                self._value_complete(self._value)
        else:
            self._skip = length

    def _push(self, is_sequence: bool) -> None:
        if len(self._open) >= DEPTH_MAX:
            raise GiveUp("sequences nested too deep")
        self._open.append((is_sequence, self._implicit))

    def _delimiter(self, tag: int, length: int) -> None:
        inside = self._open[-1][0] if self._open else None
        if tag == ITEM and inside:
            if length == UNDEFINED:
                self._push(False)
            else:
                self._skip = length
        elif (tag == ITEM_END and inside is False) or (tag == SEQUENCE_END and inside):
            self._implicit = self._open.pop()[1]
        else:
            raise GiveUp("a delimiter where none should be")
