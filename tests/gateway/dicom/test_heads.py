"""Heads say what pydicom says of the whole file, on every real one; whatever is odd is left to pydicom."""

import contextlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from gateway.dicom.heads import BULK_BYTES_MAX, TEXT_BYTES_MAX, Odd, chosen, head_of, is_whole, read_head
from storage.state.model import Kept
from tests.builders import dataset, encoded
from tests.gateway.dicom.test_identify import real_files
from tools.cli.dicom_files import NotAnInstance, read_object

SYNTAXES = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]


def same(found: Dataset, whole: Dataset, tag: int) -> bool:
    """Read from both; where that can't be done, from neither."""
    values = []
    for one in (found, whole):
        try:
            values.append(one[tag])
        except Exception as error:
            values.append(type(error))
    return bool(values[0] == values[1])


def test_a_head_says_what_the_file_says() -> None:
    compared = odd = 0
    for path in real_files():
        try:
            item = read_object(path)
        except NotAnInstance:
            continue
        whole = read_head(item.data, 0, item.transfer_syntax)
        try:
            head = head_of(item.data, item.transfer_syntax, all_there=True)
        except Odd:
            odd += 1
            continue
        assert whole is not None
        tags = [int(tag) for tag in whole._dict if int(tag) not in head.left_out]
        every = chosen(head, item.transfer_syntax, set(tags))
        assert every is not None
        assert set(tags) <= {int(tag) for tag in every._dict}, path
        rng = random.Random(str(path))
        for tag in rng.sample(tags, min(len(tags), 10)):
            one = chosen(head, item.transfer_syntax, {tag})
            assert one is not None
            assert same(one, whole, tag), (path, hex(tag))
            compared += 1
        for tag in head.left_out:
            assert chosen(head, item.transfer_syntax, {tag}) is None
    assert compared > 800
    assert odd <= 3


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_beginning_is_known_for_one(syntax: str) -> None:
    image = dataset(ImageComments="x" * 300, OtherPatientIDsSequence=[Dataset()])
    image.OtherPatientIDsSequence[0].PatientID = "1"
    image.PixelData = bytes(1000)
    data = encoded(image, syntax)
    pixels = len(data) - 1000
    whole = head_of(data, syntax, all_there=True)
    assert {head_of(data[:end], syntax, all_there=False) for end in (pixels, pixels + 1, len(data))} == {whole}
    for end in range(pixels - 12):
        assert not is_whole(bytes(5) + data[:end], 5, syntax)
        with pytest.raises(Odd):
            head_of(data[:end], syntax, all_there=False)
    assert is_whole(bytes(5) + data[:pixels], 5, syntax)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_what_is_long_is_left_out_and_named(syntax: str) -> None:
    image = dataset(IconImageSequence=[Dataset()], AcquisitionContextSequence=[Dataset()])
    image.add_new(0x60003000, "OB", bytes(BULK_BYTES_MAX))
    image.add_new(0x00420011, "OB", bytes(100))
    image.IconImageSequence[0].PixelData = bytes(TEXT_BYTES_MAX)
    image.IconImageSequence[0]["PixelData"].VR = "OW"
    head = head_of(encoded(image, syntax), syntax, all_there=True)
    assert head.left_out == (0x00880200, 0x60003000)
    found = chosen(head, syntax, {0x00420011, 0x00400555})
    assert found is not None
    assert found[0x00420011].value == bytes(100)
    assert len(found[0x00400555].value) == 1


def test_private_elements_come_with_their_creator() -> None:
    image = dataset()
    block = image.private_block(0x0019, "ACME 1.0", create=True)
    block.add_new(0x10, "LO", "secret")
    head = head_of(encoded(image), ExplicitVRLittleEndian, all_there=True)
    found = chosen(head, ExplicitVRLittleEndian, {0x00191010})
    assert found is not None
    assert found.private_block(0x0019, "ACME 1.0")[0x10].value == "secret"


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_whether_a_number_has_a_sign_is_known(syntax: str) -> None:
    image = dataset(PixelRepresentation=1, SmallestImagePixelValue=-1000, PixelPaddingValue=-2000)
    for keyword in ("SmallestImagePixelValue", "PixelPaddingValue"):
        image[keyword].VR = "SS"
    found = chosen(head_of(encoded(image, syntax), syntax, all_there=True), syntax, {0x00280106, 0x00280120})
    assert found is not None
    assert (found.SmallestImagePixelValue, found.PixelPaddingValue) == (-1000, -2000)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_also_where_that_stands_behind_it(syntax: str) -> None:
    image = dataset(PixelRepresentation=1, ReferencedImageSequence=[Dataset()])
    image.add_new(0x00189810, "SS", -5)
    image.ReferencedImageSequence[0].add_new(0x00280106, "SS", -7)
    head = head_of(encoded(image, syntax), syntax, all_there=True)
    before, within = chosen(head, syntax, {0x00189810}), chosen(head, syntax, {0x00081140})
    assert before is not None
    assert within is not None
    assert before[0x00189810].value == -5
    assert within.ReferencedImageSequence[0].SmallestImagePixelValue == -7


def test_of_what_may_stand_behind_the_pixels_nothing_is_said() -> None:
    image = dataset()
    del image.PixelData
    image.add_new(0x7FE10010, "LO", "ACME")
    image.add_new(0x7FE11001, "LO", "hello")
    data = encoded(image)
    assert not is_whole(data, 0, ExplicitVRLittleEndian)
    head = head_of(data, ExplicitVRLittleEndian, all_there=True)
    assert chosen(head, ExplicitVRLittleEndian, {0x7FE11001}) is None
    whole = read_head(data, 0, ExplicitVRLittleEndian)
    assert whole is not None
    assert whole[0x7FE11001].value == "hello"


@given(st.binary(max_size=300), st.sampled_from([*SYNTAXES, DeflatedExplicitVRLittleEndian]), st.booleans())
def test_rubbish_is_odd(data: bytes, syntax: str, all_there: bool) -> None:
    try:
        head = head_of(data, syntax, all_there=all_there)
    except Odd:
        return
    chosen(head, syntax, {0x00080005, 0x00100010})


@given(st.sampled_from(SYNTAXES), st.lists(st.tuples(st.integers(0, 499), st.integers(0, 255)), max_size=4))
def test_damaged_heads_are_odd_or_read(syntax: str, changes: list[tuple[int, int]]) -> None:
    image = dataset(OtherPatientIDsSequence=[Dataset(), Dataset()], ImageComments="comment")
    image.OtherPatientIDsSequence[0].PatientID = "1"
    raw = bytearray(encoded(image, syntax))
    for at, byte in changes:
        raw[at % len(raw)] = byte
    with contextlib.suppress(Odd):
        chosen(head_of(bytes(raw), syntax, all_there=True), syntax, {0x00204000})


def test_depth_costs_no_recursion() -> None:
    nested = b"\x40\x00\x30\xa7SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    data = nested * 50_000
    with pytest.raises(Odd):
        head_of(data, ExplicitVRLittleEndian, all_there=True)
    assert Kept(b"", ()) == head_of(b"", ExplicitVRLittleEndian, all_there=True)
