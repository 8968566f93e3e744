"""Converting for those who take nothing else: what comes out has the same pixels and the same attributes."""

from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.filebase import DicomBytesIO
from pydicom.uid import UID

from gateway.dicom.part10 import file_header
from gateway.dicom.transcode import TARGETS, CannotConvert, convert
from tools.cli.dicom_files import read_object

TRAILING_PADDING = 0xFFFCFFFC
FILES = {  # one for each kind of encoding
    "MR_small.dcm": "explicit little endian",
    "MR_small_implicit.dcm": "implicit little endian",
    "MR_small_bigendian.dcm": "explicit big endian",
    "image_dfl.dcm": "deflated",
    "MR_small_RLE.dcm": "RLE lossless",
    "MR_small_jpeg_ls_lossless.dcm": "JPEG-LS lossless",
    "MR_small_jp2klossless.dcm": "JPEG 2000 lossless",
    "SC_rgb_jpeg_dcmtk.dcm": "JPEG baseline",
    "SC_rgb_jpeg_gdcm.dcm": "JPEG lossless",
    "rtdose_rle.dcm": "RLE, 32 bits, frames",
    "693_J2KI.dcm": "JPEG 2000",
}


def data_file(name: str) -> Path:
    return Path(str(get_testdata_file(name)))


def read(data: bytes, sop_class: str, sop_instance: str, syntax: str) -> Dataset:
    return dcmread(DicomBytesIO(file_header(sop_class, sop_instance, syntax, "") + data))


@pytest.mark.parametrize("name", FILES, ids=[kind.replace(" ", "-") for kind in FILES.values()])
def test_same_pixels(name: str) -> None:
    path = data_file(name)
    item, before = read_object(path), dcmread(path)
    for target in TARGETS:
        data = convert(item.data, item.sop_class, item.sop_instance, item.transfer_syntax, target)
        after = read(data, item.sop_class, item.sop_instance, target)
        if target != "1.2.840.10008.1.2.2" or before.BitsAllocated <= 16:  # words of 32 bits in big endian: not read
            assert np.array_equal(before.pixel_array, after.pixel_array), target
        assert before.PatientID == after.PatientID
        assert before.SOPInstanceUID == after.SOPInstanceUID
        tags = {element.tag for element in before if element.tag.element != 0} - {TRAILING_PADDING}
        assert tags <= {element.tag for element in after}


def test_uncompressed_is_not_changed_by_going_there_and_back() -> None:
    item = read_object(data_file("MR_small.dcm"))
    big = convert(item.data, item.sop_class, item.sop_instance, item.transfer_syntax, "1.2.840.10008.1.2.2")
    back = convert(big, item.sop_class, item.sop_instance, "1.2.840.10008.1.2.2", item.transfer_syntax)
    first = read(item.data, item.sop_class, item.sop_instance, item.transfer_syntax)
    second = read(back, item.sop_class, item.sop_instance, item.transfer_syntax)
    assert first == second
    assert UID(item.transfer_syntax).is_little_endian


def test_damaged_pixels_cannot_be_had_in_another_syntax() -> None:
    item = read_object(data_file("MR_small_jp2klossless.dcm"))
    damaged = item.data[:-4000] + bytes(4000)
    with pytest.raises(CannotConvert):
        convert(damaged, item.sop_class, item.sop_instance, item.transfer_syntax, TARGETS[0])
