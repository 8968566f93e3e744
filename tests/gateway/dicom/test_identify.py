"""Identity and query keys: the quick scan agrees with pydicom on every real file, and never says something wrong."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from gateway.dicom.identify import ELEMENTS_LOOKED_AT, Identifier, Identity, Unreadable, _parsed
from gateway.dicom.identify import identify as identify_file
from gateway.dicom.sop_classes import encoding_of
from tests.builders import dataset, encoded
from tools.cli.dicom_files import NotAnInstance, read_object
from tools.lab.samples import data_folder


def identify(data: bytes, syntax: str) -> Identity:
    return identify_file(BytesIO(data), syntax)


def real_files() -> list[Path]:
    bundled = Path(pydicom.__file__).parent / "data" / "test_files"
    found = [*data_folder().rglob("*.dcm"), *bundled.glob("*.dcm")]
    return sorted(path for path in found if path.read_bytes()[128:132] == b"DICM")


def slow(data: bytes, syntax: str) -> Identity:
    implicit, little, _ = encoding_of(syntax)
    return _parsed(BytesIO(data), implicit, little, "")


def quick(data: bytes, syntax: str, piece: int) -> Identity | None:
    identifier = Identifier(syntax)
    for at in range(0, len(data), piece):
        identifier.feed(memoryview(data)[at : at + piece])
    return identifier.identity()


@pytest.mark.parametrize("piece", [7, 1000, 1 << 30])
def test_scan_agrees_with_pydicom_on_real_files(piece: int) -> None:
    compared = 0
    for path in real_files():
        try:
            item = read_object(path)
        except NotAnInstance:
            continue
        if encoding_of(item.transfer_syntax)[2] or (piece == 7 and len(item.data) > 200_000):
            continue
        found = quick(item.data, item.transfer_syntax, piece)
        if found is None:
            continue
        assert found == slow(item.data, item.transfer_syntax), path.name
        compared += 1
    assert compared > 40


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_transfer_syntaxes(syntax: str) -> None:
    made = dataset(SpecificCharacterSet="ISO_IR 100", PatientName="Äneas^Rüdiger", Rows=512)
    found = identify(encoded(made, syntax), syntax)
    assert isinstance(found, Identity)
    assert found.sop_instance == made.SOPInstanceUID
    assert found.keys["PatientName"] == "Äneas^Rüdiger"
    assert found.keys["Rows"] == "512"


def test_deflated() -> None:
    made = dataset()
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = packer.compress(encoded(made)) + packer.flush()
    found = identify(data, DeflatedExplicitVRLittleEndian)
    assert found.study == made.StudyInstanceUID


def test_identity_behind_the_pixels() -> None:
    made = dataset()
    study = made.StudyInstanceUID
    del made.StudyInstanceUID
    value = study.encode() + b"\0" * (len(study) % 2)
    data = encoded(made) + struct.pack("<HH2sH", 0x20, 0x0D, b"UI", len(value)) + value
    found = quick(data, ExplicitVRLittleEndian, 50)
    assert found is not None
    assert found.study == study == identify(data, ExplicitVRLittleEndian).study


def nested(depth: int) -> bytes:
    start = struct.pack("<HH2sxxL", 0x21, 0x1000, b"SQ", 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    return start * depth + struct.pack("<HHLHHL", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0) * depth


@pytest.mark.parametrize("depth", [1, 200, 5000])
def test_sequences_of_any_depth(depth: int) -> None:
    """Nobody's stack is used: what is too much for the scan on the way in is read all the same."""
    made = dataset()
    del made.PixelData
    head = encoded(made)
    at = head.index(struct.pack("<HH", 0x28, 0x10))
    data = head[:at] + nested(depth) + head[at:]
    found = quick(data, ExplicitVRLittleEndian, 1000)
    assert (found is None) == (4 * depth > ELEMENTS_LOOKED_AT)
    assert identify(data, ExplicitVRLittleEndian).keys["Rows"] == "8"


def test_un_of_undefined_length_is_implicit_inside() -> None:
    made = dataset()
    head = encoded(made)
    at = head.index(struct.pack("<HH", 0x28, 0x10))
    inside = struct.pack("<HHL", 0x21, 0x1001, 4) + b"abcd"
    item_of = struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF) + inside + struct.pack("<HHL", 0xFFFE, 0xE00D, 0)
    unknown = (
        struct.pack("<HH2sxxL", 0x21, 0x1000, b"UN", 0xFFFFFFFF) + item_of + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    )
    found = quick(head[:at] + unknown + head[at:], ExplicitVRLittleEndian, 13)
    assert found is not None
    assert found.keys["Rows"] == "8"


def test_character_sets() -> None:
    made = dataset(SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName="Yamada^Tarou=山田^太郎=やまだ^たろう")
    found = identify(encoded(made), ExplicitVRLittleEndian)
    assert found.keys["PatientName"] == "Yamada^Tarou=山田^太郎=やまだ^たろう"


@given(st.binary(max_size=400), st.sampled_from([ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]))
def test_rubbish_is_unreadable_or_has_no_identity(data: bytes, syntax: str) -> None:
    try:
        found = identify(data, syntax)
    except Unreadable:
        return
    assert found.sop_instance == "" or len(data) > 16
