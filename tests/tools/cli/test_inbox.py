"""What is put into the inbox: stored and gone, or rejected with a reason, and never taken half-written or lost."""

import contextlib
import io
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

from tests.conftest import Gateway, wait_for
from tools.cli import inbox as module
from tools.cli.importing import Target, Unreachable
from tools.cli.inbox import CALLING, REJECTED, TAKEN, Inbox, fitting, safe

MB = 1 << 20


def image(folder: Path, name: str = "image.dcm", uid: str = "") -> Path:
    """A real one, under a UID of its own."""
    found = dcmread(get_testdata_file("CT_small.dcm"))
    found.SOPInstanceUID = found.file_meta.MediaStorageSOPInstanceUID = uid or generate_uid()
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save_as(path)
    return path


def new_inbox(gateway: Gateway, folder: Path, quiet_s: float = 0.0, largest_bytes: int = 16 * MB) -> Inbox:
    folder.mkdir(exist_ok=True)
    (folder / REJECTED).mkdir(exist_ok=True)
    target = Target("127.0.0.1", gateway.port, "TANDEM", None, CALLING, 5.0)
    return Inbox(folder, target, quiet_s, largest_bytes)


def left(folder: Path) -> set[str]:
    """What is there, but for what was rejected."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return {name for name in found if not name.startswith(REJECTED)}


def rejected(folder: Path) -> dict[str, str]:
    """Why, by name."""
    top = folder / REJECTED
    return {
        str(path.relative_to(top)): path.with_name(f"{path.name}.txt").read_text(encoding="utf-8")
        for path in top.rglob("*")
        if path.is_file() and not path.is_symlink() and path.suffix != ".txt"
    }


def test_files_and_folders_of_them_are_stored_and_go(gateway: Gateway, tmp_path: Path) -> None:
    inbox = new_inbox(gateway, tmp_path / "in")
    before = gateway.status()["instances"]
    for name in ("one.dcm", "a/b/two", "a/Ünï cödé.dcm", "a/" + "x" * 250):
        image(tmp_path / "in", name)
    assert inbox.turn() == 4
    assert left(tmp_path / "in") == set() and rejected(tmp_path / "in") == {}
    assert gateway.status()["instances"] == before + 4


def test_what_isnt_dicom_is_rejected_with_a_reason(gateway: Gateway, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    inbox = new_inbox(gateway, folder)
    (folder / "report.pdf").write_bytes(b"%PDF-1.4 and so on")
    (folder / "empty").touch()
    (folder / "sub").mkdir()
    (folder / "sub" / os.fsdecode(b"\xff\xfe.bin")).write_bytes(os.urandom(1000))
    (folder / ("y" * 254)).write_bytes(b"x")
    (folder / "link").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe")
    whole = image(tmp_path).read_bytes()
    (folder / "cut.dcm").write_bytes(whole[: len(whole) // 2])
    assert inbox.turn() == 7
    assert left(folder) == set()
    why = rejected(folder)
    assert set(why) >= {"report.pdf", "empty", "cut.dcm", "y" * 224}
    assert "Not a DICOM file" in why["report.pdf"] and "broken off" in why["cut.dcm"]
    assert "kept here until somebody deletes it" in why["report.pdf"]
    assert (folder / REJECTED / "link").is_symlink()
    assert "It is a link" in (folder / REJECTED / "link.txt").read_text()
    (folder / "report.pdf").write_bytes(b"another")
    inbox.turn()
    assert (folder / REJECTED / "report (2).pdf").read_bytes() == b"another"
    assert (folder / REJECTED / "report.pdf").read_bytes() == b"%PDF-1.4 and so on"


def test_other_bytes_under_a_uid_that_is_stored_are_rejected_and_the_same_are_not(
    gateway: Gateway, tmp_path: Path
) -> None:
    folder, uid = tmp_path / "in", generate_uid()
    inbox = new_inbox(gateway, folder)
    first = image(folder, uid=uid).read_bytes()
    assert inbox.turn() == 1
    (folder / "again.dcm").write_bytes(first)
    assert inbox.turn() == 1
    assert rejected(folder) == {}
    other = dcmread(io.BytesIO(first))
    other.PatientID, other.StudyInstanceUID = "SOMEBODY ELSE", generate_uid()
    other.save_as(folder / "other.dcm")
    inbox.turn()
    assert "other bytes are stored under its SOP Instance UID" in rejected(folder)["other.dcm"]


def test_a_zip_is_unpacked(gateway: Gateway, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    inbox = new_inbox(gateway, folder, largest_bytes=MB)
    before = gateway.status()["instances"]
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("x", b"x")
    with zipfile.ZipFile(folder / "study.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("IM1", "sub/IM2", "../../outside.dcm", "/absolute.dcm"):
            archive.writestr(name, image(tmp_path, "scratch").read_bytes())
        archive.writestr("README.TXT", b"hello")
        archive.writestr("../../../evil", b"evil")
        archive.writestr("inner.zip", inner.getvalue())
        archive.writestr("bomb.bin", bytes(2 * MB))
        archive.writestr("Thumbs.db", b"litter")
        archive.writestr("folder/", b"")
    assert inbox.turn() == 9
    assert gateway.status()["instances"] == before + 4
    why = rejected(folder)
    assert set(why) == {"study.zip/README.TXT", "study.zip/evil", "study.zip/inner.zip", "study (2).zip"}
    assert "can't be unpacked" in why["study (2).zip"]  # for the sake of the one that is too long
    assert "ZIP file in a ZIP file" in why["study.zip/inner.zip"]
    assert "max_object_bytes" in (folder / REJECTED / "study.zip" / "bomb.bin.txt").read_text()
    assert left(folder) == set() and not list(tmp_path.glob("outside*")) and not list(tmp_path.glob("evil*"))


def test_what_was_rejected_is_never_overwritten(gateway: Gateway, tmp_path: Path) -> None:
    """Two ZIPs of one name, files and folders of one name, a file that is called as what is said of another."""
    folder = tmp_path / "in"
    inbox = new_inbox(gateway, folder)
    kept = []
    for number in range(3):
        with zipfile.ZipFile(folder / "export.zip", "w") as archive:
            archive.writestr("note", b"%d" % number)
            archive.writestr("sub/a", b"a%d" % number)
            archive.writestr("sub\\a", b"b%d" % number)
        kept += [b"%d" % number, b"a%d" % number, b"b%d" % number]
        inbox.turn()
    for name in ("scan.txt", "scan", "a" * 220 + ".txt", "folder"):
        (folder / name).write_bytes(name.encode())
        kept.append(name.encode())
        inbox.turn()
    (folder / "folder").mkdir()
    (folder / "folder" / "in it").write_bytes(b"in it")
    inbox.turn()
    found = [path.read_bytes() for path in (folder / REJECTED).rglob("*") if path.is_file()]
    assert sorted(one for one in found if not one.startswith(b"export") and b"This wasn't" not in one) == sorted(
        [*kept, b"in it"]
    )
    assert sum(b"This wasn't" in one for one in found) == len(kept) + 1
    assert left(folder) == set()


def test_one_that_is_trouble_holds_up_no_other(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    inbox = new_inbox(gateway, folder, largest_bytes=MB)
    image(folder, "a.dcm")
    image(folder, "b.dcm")
    (folder / "long").write_bytes(bytes(MB + 1))
    looked_at = module.looked_at

    def fails(path: Path) -> object:
        if path.name == "a.dcm":
            raise MemoryError("whatever")
        return looked_at(path)

    monkeypatch.setattr(module, "looked_at", fails)
    assert inbox.turn() == 2
    assert inbox.stored == 1 and [name.split("/")[-1] for name in left(folder)] == ["a.dcm"]
    assert "max_object_bytes" in rejected(folder)["long"]
    monkeypatch.undo()
    assert inbox.turn() == 0  # not at once
    wait_for(lambda: inbox.turn(), "it to be tried again")
    assert left(folder) == set()


def test_a_file_whose_end_was_never_written_is_rejected(gateway: Gateway, tmp_path: Path) -> None:
    """As a client leaves it that is cut off after it has said how long the file is to be."""
    folder = tmp_path / "in"
    inbox = new_inbox(gateway, folder)
    whole = image(tmp_path).read_bytes()
    with (folder / "half.dcm").open("wb") as file:
        file.truncate(len(whole))
        file.write(whole[: len(whole) // 2])
    inbox.turn()
    assert "broken off" in rejected(folder)["half.dcm"]


def test_nothing_is_stored_that_nobody_has_said_is(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    inbox = new_inbox(gateway, folder)
    image(folder, "a.dcm")
    monkeypatch.setattr(module, "bring_in", lambda *_: None)
    assert inbox.turn() == 0
    assert len(left(folder)) == 1


def test_a_zip_that_cant_be_read_is_rejected_whole(gateway: Gateway, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    inbox = new_inbox(gateway, folder)
    good = io.BytesIO()
    with zipfile.ZipFile(good, "w") as archive:
        archive.writestr("IM1", image(tmp_path, "scratch").read_bytes())
    (folder / "cut.zip").write_bytes(good.getvalue()[:-40])
    damaged = bytearray(good.getvalue())
    damaged[5000] ^= 1
    (folder / "damaged.zip").write_bytes(damaged)
    inbox.turn()
    assert {"cut.zip", "damaged.zip"} == set(rejected(folder))
    assert all("can't be read" in text for text in rejected(folder).values())


def test_a_medium_is_taken_image_by_image(gateway: Gateway, tmp_path: Path) -> None:
    """Real media with DICOMDIR, as they are copied from a CD."""
    folder = tmp_path / "in"
    inbox = new_inbox(gateway, folder)
    source = Path(get_testdata_file("DICOMDIR") or "").parent
    shutil.copytree(source, folder / "CD")
    (folder / "CD" / "AUTORUN.INF").write_bytes(b"[autorun]")
    images = [path for path in source.rglob("*") if path.is_file() and path.read_bytes()[128:132] == b"DICM"]
    images = [path for path in images if not path.name.startswith("DICOMDIR")]
    assert len(images) > 20
    while inbox.turn():
        pass
    assert inbox.stored == len(images)
    assert set(rejected(folder)) >= {"CD/AUTORUN.INF", "CD/TINY_ALPHA/README"}
    assert not any("DICOMDIR" in name for name in rejected(folder))


def test_what_is_being_written_is_left_alone(gateway: Gateway, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    inbox = new_inbox(gateway, folder, quiet_s=1.0)
    whole = image(tmp_path).read_bytes()
    stop = threading.Event()

    def write() -> None:
        with (folder / "slow.dcm").open("wb", buffering=0) as file:
            for at in range(0, len(whole), len(whole) // 20):
                file.write(whole[at : at + len(whole) // 20])
                os.utime(folder / "slow.dcm", (1, 1))  # its times are as old as whoever copies it says
                stop.wait(0.2)

    writer = threading.Thread(target=write)
    writer.start()
    deadline = time.monotonic() + 60
    while writer.is_alive() and time.monotonic() < deadline:
        inbox.turn()
        time.sleep(0.02)
    writer.join()
    wait_for(lambda: inbox.turn() or inbox.stored, "it to be taken")
    assert (inbox.stored, rejected(folder)) == (1, {})


def test_what_changes_while_it_is_set_aside_is_put_back(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    inbox = new_inbox(gateway, folder)
    image(folder, "one.dcm")
    asked: list[Path] = []

    def opened_in_between(path: Path) -> bool:
        asked.append(path)
        return TAKEN in path.parts  # not when it was looked at first

    monkeypatch.setattr(module, "is_open", opened_in_between)
    assert inbox.turn() == 0
    assert left(folder) == {"one.dcm"} and len(asked) == 2
    monkeypatch.undo()
    assert inbox.turn() == 1


def test_nothing_is_lost_while_nobody_takes_it(new_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    """And what an earlier process had set aside is stored by the next, beside a new file of its name."""
    gateway = new_gateway()
    folder = tmp_path / "in"
    first = image(tmp_path, "1").read_bytes()
    inbox = new_inbox(gateway, folder)
    (folder / "image.dcm").write_bytes(first)
    gateway.stop()
    with pytest.raises(Unreachable):
        inbox.turn()
    assert [name.split("/")[-1] for name in left(folder)] == ["image.dcm"]
    second = image(folder).read_bytes()
    with pytest.raises(Unreachable):
        inbox.turn()
    found = sorted(path.read_bytes() for path in folder.rglob("image.dcm"))
    assert found == sorted([first, second])
    gateway.start()
    inbox = new_inbox(gateway, folder)
    while len(left(folder)):
        inbox.turn()
    assert (inbox.stored, gateway.status()["instances"], rejected(folder)) == (2, 2, {})


def test_whom_the_gateway_doesnt_know_waits(new_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    gateway = new_gateway(TANDEM__DICOM__CALLING_AETS='["CT1"]')
    folder = tmp_path / "in"
    inbox = new_inbox(gateway, folder)
    image(folder)
    with pytest.raises(Unreachable, match="we call as INBOX"):
        inbox.turn()
    assert len(left(folder)) == 1 and rejected(folder) == {}


def test_folders_that_are_empty_for_long_go(gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "in"
    inbox = new_inbox(gateway, folder)
    image(folder, "study/series/image.dcm")
    (folder / "study" / "empty").mkdir()
    inbox.turn()
    inbox.turn()
    assert (folder / "study" / "series").is_dir()  # somebody may be about to write there
    monkeypatch.setattr(module, "FOLDER_QUIET_S", 0.0)
    for _ in range(4):
        inbox.turn()
    assert {path.name for path in folder.iterdir()} == {REJECTED, TAKEN}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a/b", "a/b"),
        ("../../a", "a"),
        ("/a/./b", "a/b"),
        ("a\\..\\b", "a/b"),
        ("..", "_"),
        ("//a/b", "a/b"),
        ("///a", "a"),
        ("\\\\host\\a", "host/a"),
        ("x" * 300, "x" * 224),
        ("", "_"),
        ("C:\\x\\y", "C:/x/y"),
    ],
)
def test_names_in_a_zip_lead_nowhere_else(name: str, path: str) -> None:
    assert safe(name) == Path(path)


def test_names_are_cut_to_what_can_be_read_over_smb() -> None:
    for name, end in (("x" * 300, ".txt"), ("ä" * 200, " (2).dcm"), ("a", ".txt"), ("\udcff" * 250, ".txt")):
        cut = fitting(name, end)
        assert cut.endswith(end) and len(os.fsencode(cut)) <= 224
        with contextlib.suppress(UnicodeEncodeError):
            cut.encode()
