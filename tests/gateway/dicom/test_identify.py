"""Identity and query keys: the quick scan agrees with pydicom on every real file, and never says something wrong."""

import zlib
from pathlib import Path

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from gateway.dicom.identify import Identity, Unreadable, _identity, _parse, identify
from gateway.dicom.scan import GiveUp, Scanner
from storage.state import keys
from tests.builders import dataset, encoded
from tools.cli.dicom_files import NotAnInstance, read_object
from tools.lab.samples import data_folder


def real_files() -> list[Path]:
    bundled = Path(pydicom.__file__).parent / "data" / "test_files"
    found = [*data_folder().rglob("*.dcm"), *bundled.glob("*.dcm")]
    return sorted(path for path in found if path.read_bytes()[128:132] == b"DICM")


def test_scan_agrees_with_pydicom_on_real_files() -> None:
    compared = 0
    for path in real_files():
        try:
            item = read_object(path)
        except NotAnInstance:
            continue
        syntax = UID(item.transfer_syntax)
        if syntax.is_deflated:
            continue
        scanner = Scanner(item.data, implicit=syntax.is_implicit_VR, little=syntax.is_little_endian)
        try:
            wanted = frozenset((*keys.ALL.values(), 0x00080005))
            quick = _identity(scanner.find(wanted, keys.LAST_TAG), syntax.is_little_endian, "")
        except GiveUp:
            continue
        slow = _parse(item.data, syntax, "", whole=True)
        assert quick == slow, path.name
        compared += 1
    assert compared > 60


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_transfer_syntaxes(syntax: str) -> None:
    made = dataset(SpecificCharacterSet="ISO_IR 100", PatientName="Äneas^Rüdiger", Rows=512)
    found = identify(encoded(made, syntax), syntax, whole=True)
    assert isinstance(found, Identity)
    assert found.sop_instance == made.SOPInstanceUID
    assert found.keys["PatientName"] == "Äneas^Rüdiger"
    assert found.keys["Rows"] == "512"


def test_deflated() -> None:
    made = dataset()
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = packer.compress(encoded(made)) + packer.flush()
    found = identify(data, DeflatedExplicitVRLittleEndian, whole=True)
    assert found is not None
    assert found.study == made.StudyInstanceUID


def test_a_head_without_the_identity_asks_for_more() -> None:
    data = encoded(dataset())
    assert identify(data[:40], ExplicitVRLittleEndian, whole=False) is None


def test_character_sets() -> None:
    made = dataset(SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName="Yamada^Tarou=山田^太郎=やまだ^たろう")
    found = identify(encoded(made), ExplicitVRLittleEndian, whole=True)
    assert found is not None
    assert found.keys["PatientName"] == "Yamada^Tarou=山田^太郎=やまだ^たろう"


@given(st.binary(max_size=400), st.sampled_from([ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]))
def test_rubbish_is_unreadable_or_has_no_identity(data: bytes, syntax: str) -> None:
    try:
        found = identify(data, syntax, whole=True)
    except Unreadable:
        return
    assert found is None or found.sop_instance == "" or len(data) > 16
