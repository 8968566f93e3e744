"""The inbox over SMB: what a client puts there is in the archive of both nodes, also if a node dies meanwhile."""

import hashlib
import io

from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

from tests.conftest import wait_for
from tests.system.conftest import SYNC_S, other_than, primary_of
from tests.system.smb import Session, have_user
from tests.system.test_share import mounted
from tests.system.test_smb import lets_in
from tools.lab.network import inside
from tools.lab.pair import Lab
from tools.lab.samples import archived


def image() -> tuple[str, bytes]:
    """(SOP Instance UID, file)"""
    found = dcmread(get_testdata_file("CT_small.dcm"))
    found.SOPInstanceUID = found.file_meta.MediaStorageSOPInstanceUID = uid = generate_uid()
    out = io.BytesIO()
    found.save_as(out)
    return str(uid), out.getvalue()


def data_set(file: bytes) -> str:
    start = 144 + int.from_bytes(file[140:144], "little")
    return hashlib.sha256(file[start:]).hexdigest()


def is_stored(lab: Lab, wanted: dict[str, bytes], *nodes: str) -> bool:
    try:
        held = [archived(lab.volumes(node)) for node in nodes]
        return all(
            uid in found and data_set(found[uid].read_bytes()) == data_set(file)
            for found in held
            for uid, file in wanted.items()
        )
    except OSError:  # it is being moved
        return False


def test_what_is_put_there_is_archived_on_both_nodes(lab: Lab) -> None:
    primary = primary_of(lab)
    have_user(lab, primary)
    mounted(lab, primary, writable=True)
    wanted = dict(image() for _ in range(12))
    uid, held = image()
    with inside("client"), Session("inbox") as session:
        wait_for(lambda: "rejected" in session.names(), "the inbox to be there")
        session.mkdir(r"CD\IMAGES")
        for number, data in enumerate(wanted.values()):
            session.write(rf"CD\IMAGES\IM{number}" if number % 2 else rf"IM{number}.dcm", data)
        session.write("letter.pdf", b"%PDF-1.7")
        with session.open("cut.dcm", "wb") as file:  # as a client leaves it that had said how long it is to be
            file.truncate(len(held))
            file.write(held[: len(held) // 2])
        with session.open("open.dcm", "wb") as file:  # all of it is there, and it isn't closed
            file.write(held)
            file.fd.flush()
            wait_for(lambda: is_stored(lab, wanted, "a", "b"), "all to be archived", SYNC_S)
            wait_for(lambda: "letter.pdf.txt" in session.names("rejected"), "the letter to be rejected")
            assert "open.dcm" in session.names() and not is_stored(lab, {uid: held}, primary)
        assert b"broken off" in session.read(r"rejected\cut.dcm.txt")
        wait_for(lambda: is_stored(lab, {uid: held}, "a", "b"), "what was closed to be archived")
        assert b"Not a DICOM file" in session.read(r"rejected\letter.pdf.txt")
        assert session.read(r"rejected\letter.pdf") == b"%PDF-1.7"
        wait_for(lambda: not {name for name in session.names() if name.endswith(".dcm")}, "them to vanish")


def test_nothing_is_lost_or_rejected_when_the_primary_dies(lab: Lab) -> None:
    primary = primary_of(lab)
    have_user(lab, primary)
    mounted(lab, primary, writable=True)
    wanted = dict(image() for _ in range(60))
    with inside("client"), Session("inbox") as session:
        wait_for(lambda: "rejected" in session.names(), "the inbox to be there")
        before = session.names("rejected")
        session.mkdir("dies")
        for number, data in enumerate(wanted.values()):
            session.write(rf"dies\{number}.dcm", data)
    wait_for(lambda: archived(lab.volumes(primary)).keys() & wanted.keys(), "the first to be archived", SYNC_S)
    lab.power_off(primary)
    standby = other_than(primary)
    wait_for(lambda: lab.primary() == standby, "the other node to serve", SYNC_S)
    wait_for(lambda: is_stored(lab, wanted, standby), "all to be archived", SYNC_S)
    wait_for(lambda: lets_in("pacs", "correct horse", "inbox"), "smbd to let us in", SYNC_S)
    with inside("client"), Session("inbox") as session:
        wait_for(lambda: not session.names("dies"), "all to vanish", SYNC_S)
        assert session.names("rejected") == before
    lab.power_on(primary)
    wait_for(lab.in_sync, "the pair to be in sync", SYNC_S)
    wait_for(lambda: is_stored(lab, wanted, primary), "all to be archived there", SYNC_S)
