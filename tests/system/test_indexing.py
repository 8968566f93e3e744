"""DICOM files in the share's files: viewers find and get them where they lie, for as long as they lie there."""

import os
from pathlib import Path

from pydicom import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from gateway.dicom.part10 import file_header
from tests.builders import item
from tests.conftest import wait_for
from tests.system.conftest import SYNC_S, other_than, primary_of
from tests.system.smb import PASSWORD, USER, Session, SmbWriter, have_user
from tests.system.test_services import FIND, associate, got, keys
from tests.system.test_share import differing, mounted, same_on_both
from tests.system.test_smb import lets_in, switch_over
from tests.system.test_switchover import tandem
from tests.system.writer import Writer
from tools.cli.dicom_client import DicomClient, Object
from tools.lab.network import ADDRESSES, VIP, inside
from tools.lab.pair import AET, DICOM_PORT, Lab

LONG = 6 << 20  # of pixels: read and checked by blocks


def image(study: str, pixels: int = 40_000, **values: object) -> Object:
    return item(StudyInstanceUID=study, SOPInstanceUID=generate_uid(), PixelData=os.urandom(pixels), **values)


def file_of(one: Object) -> bytes:
    return file_header(one.sop_class, one.sop_instance, one.transfer_syntax, "PACS") + one.data


def found(study: str, address: str = VIP) -> set[str]:
    """SOP Instance UIDs, by C-FIND."""
    asked = keys(study, QueryRetrieveLevel="IMAGE", SeriesInstanceUID="", SOPInstanceUID="")
    with inside("client"):
        association = associate(address, FIND)
        assert association.is_established
        answers = [answer for _, answer in association.send_c_find(asked, FIND)]
        association.release()
    return {str(answer.SOPInstanceUID) for answer in answers if isinstance(answer, Dataset)}


def uids(*images: Object) -> set[str]:
    return {one.sop_instance for one in images}


def store(one: Object) -> int:
    context = [(str(CTImageStorage), str(ExplicitVRLittleEndian))]
    with inside("client"), DicomClient(VIP, DICOM_PORT, AET, context, 60) as client:
        return client.store(one)


def test_the_catalogue_follows_what_lies_in_the_files(lab: Lab) -> None:
    primary = primary_of(lab)
    have_user(lab, primary)
    mounted(lab, primary, writable=True)
    study = generate_uid()
    first, second, third, long = image(study), image(study), image(study), image(study, LONG)
    with inside("client"), Session() as session:
        session.mkdir("old-pacs")
        for name, one in (("1.dcm", first), ("~2", second), ("3", third), ("long", long)):
            session.write(rf"old-pacs\{name}", file_of(one))
        session.rename(r"old-pacs\~2", r"old-pacs\2.dcm")
        session.write(r"old-pacs\half.dcm", file_of(image(study))[:-1000])
        session.write(r"old-pacs\database", os.urandom(50_000))
        wait_for(lambda: found(study) == uids(first, second, third, long), "all of them to be found", SYNC_S)
        for address in (VIP, ADDRESSES[primary], ADDRESSES[other_than(primary)]):
            wait_for(lambda address=address: len(found(study, address)) == 4, "the standby to find them")
            assert got(address, study) == {one.sop_instance: one.data for one in (first, second, third, long)}
        other = image(study)
        session.write(r"old-pacs\3", file_of(other))  # in the place of another
        session.remove(r"old-pacs\1.dcm")
        session.rename(r"old-pacs\2.dcm", r"old-pacs\moved.dcm")
        wait_for(lambda: found(study) == uids(second, other, long), "the catalogue to follow", SYNC_S)
        with session.open(r"old-pacs\moved.dcm", "r+b") as file:
            file.seek(500)
            file.write(b"\xff" * 9000)  # no data set any more
        wait_for(lambda: found(study) == uids(other, long), "what is broken not to be found", SYNC_S)
    switch_over(lab)
    assert found(study) == uids(other, long)
    assert got(VIP, study) == {one.sop_instance: one.data for one in (other, long)}


def test_what_the_archive_has_goes_before_what_lies_in_a_file(lab: Lab) -> None:
    primary = primary_of(lab)
    have_user(lab, primary)
    mounted(lab, primary, writable=True)
    study = generate_uid()
    one, two = image(study), image(study)
    before = lab.node_status(primary)["files"]
    assert store(one) == 0
    with inside("client"), Session() as session:
        session.mkdir("doubles")
        for name, what in (("one", one), ("two", two), ("two again", two)):
            session.write(rf"doubles\{name}", file_of(what))
        wait_for(
            lambda: lab.node_status(primary)["files"]["images"] == before["images"] + 3, "all to be looked at", SYNC_S
        )
        assert lab.node_status(primary)["files"]["doubles"] == before["doubles"] + 2
        assert found(study) == uids(one, two)
        assert store(two) == 0  # who sends it is told Success when the archive has it, and not for a file of others
        assert lab.node_status(primary)["files"]["doubles"] == before["doubles"] + 3
        for name in ("one", "two", "two again"):
            session.remove(rf"doubles\{name}")
    assert found(study) == uids(one, two)
    assert got(VIP, study) == {what.sop_instance: what.data for what in (one, two)}
    assert lab.node_status(primary)["files"]["doubles"] == before["doubles"]


def test_a_day_in_the_hospital(lab: Lab) -> None:
    """An old PACS stores studies as files and keeps a database beside them, a modality sends, viewers find what both
    bring; then the power goes."""
    primary = primary_of(lab)
    have_user(lab, primary)
    mounted(lab, primary, writable=True)
    study = generate_uid()
    images = [image(study) for _ in range(30)]
    pacs = SmbWriter("pacs", 5)
    with Writer(lab) as modality, pacs.running():
        with inside("client"), Session() as session:
            for number, one in enumerate(images):
                session.write(rf"pacs\{number}.tmp", file_of(one))
                session.rename(rf"pacs\{number}.tmp", rf"pacs\{number}.dcm")
        wait_for(lambda: found(study) == uids(*images), "what was stored over SMB to be found", SYNC_S)
        modality.wait_for_more(20)
        lab.power_off(primary)
        modality.wait_for_more(20)
        pacs.wait_for_more()
        assert found(study) == uids(*images)
        assert got(VIP, study) == {one.sop_instance: one.data for one in images}
        late = image(study)
        wait_for(lambda: lets_in(USER, PASSWORD), "smbd to let us in", SYNC_S)
        with inside("client"), Session() as session:
            session.write(r"pacs\late.dcm", file_of(late))
        wait_for(lambda: late.sop_instance in found(study), "the new primary to look at files", SYNC_S)
        lab.power_on(primary)
        wait_for(lab.in_sync, "the pair to be in sync", SYNC_S)
    pacs.check()
    modality.check()
    same_on_both(lab)
    assert found(study, ADDRESSES[primary]) == uids(*images, late)
    assert got(ADDRESSES[primary], study) == {one.sop_instance: one.data for one in (*images, late)}


def test_a_bit_that_flips_in_a_file_is_found(lab: Lab) -> None:
    primary = primary_of(lab)
    point = mounted(lab, primary, writable=True)
    study = generate_uid()
    images = [image(study), image(study, LONG)]
    for number, one in enumerate(images):
        (point / f"rot{number}.dcm").write_bytes(file_of(one))
    wait_for(lambda: found(study) == uids(*images), "them to be found", SYNC_S)
    same_on_both(lab)
    for node, number in ((primary, 0), (primary, 1), (other_than(primary), 0), (other_than(primary), 1)):
        flip(lab, node, (point / f"rot{number}.dcm").stat().st_ino)
        code, output = tandem(lab, node, "scrub", "--now")
        assert code == 0, output
        assert (lab.node_status(node) or {})["scrub"]["bad"], output
        wait_for(lambda: not differing(lab), "the copy to be made again", SYNC_S)
        assert got(VIP, study) == {one.sop_instance: one.data for one in images}


def copies_of(lab: Lab, node: str, inode: int) -> list[Path]:
    return [path for volume in lab.volumes(node) for path in (volume / "files").rglob(f"{inode:016x}*")]


def flip(lab: Lab, node: str, inode: int) -> None:
    """A bit of the last byte of a file's copy."""
    [path] = [path for path in copies_of(lab, node, inode) if path.stat().st_size]
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
