"""Any file may lie in the share: an instance is known as pydicom knows it, everything else is left alone."""

from pathlib import Path

import pytest
from pydicom import dcmread

from conf.settings import DicomSettings
from gateway.archive.indexing import NoInstance, identified
from tests.gateway.dicom.test_identify import real_files


def test_real_files() -> None:
    known, none = 0, 0
    for path in real_files():
        try:
            header, identity = identified(path, DicomSettings())
        except NoInstance:
            none += 1
            continue
        known += 1
        there = dcmread(path, stop_before_pixels=True)
        assert (identity.sop_instance, identity.study) == (there.SOPInstanceUID, there.StudyInstanceUID)
        assert header.transfer_syntax == there.file_meta.TransferSyntaxUID
    assert known > 100 and none > 5, (known, none)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 132, b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM" + b"\xff" * 5000, b"SQLite format 3\0" * 100],
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(NoInstance):
        identified(path, DicomSettings())
