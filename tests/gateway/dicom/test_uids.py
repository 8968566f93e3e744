"""What is a UID."""

from gateway.dicom import uids


def test_uids() -> None:
    assert uids.is_uid("1.2.840.10008.1.1")
    for bad in ("", "1..2", "1.2.", "1.2/3", "a", "1." * 33 + "1", "1.2\n"):
        assert not uids.is_uid(bad)
