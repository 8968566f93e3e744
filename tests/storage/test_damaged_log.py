"""A log that isn't what was written, or isn't there: nobody goes on as if it had said nothing."""

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydicom.uid import generate_uid

from storage.control_client import order
from storage.environment import LOG_BYTES_MIN, LogAway, open_log
from storage.log.folder import LocalFolder, LogDamaged, LogUnknown
from storage.log.records import ENTRY
from storage.log.salvage import set_aside_before
from storage.state.catalogue import FORMAT, Batch, Catalogue
from storage.state.formats import bring_up_to_date
from storage.state.logged import record_of
from storage.state.model import Delete, Entry
from tests.builders import item
from tests.conftest import Gateway, wait_for
from tests.storage.test_locks import files_of, rebuilt, stored, tandem


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    made = Catalogue.open(tmp_path / "catalogue", 1 << 26)
    made.write(Batch(meta={"format": FORMAT, "store_id": "this", "whole": True}))
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "log")


def entries(count: int) -> list[Entry]:
    return [Entry(1, seq, Delete(f"1.2.{seq}", "", "", "", "", 0.0)) for seq in range(1, count + 1)]


def filled(folder: LocalFolder, catalogue: Catalogue, count: int = 20, known: int = 5) -> None:
    """A log of `count` entries, `known` of which the catalogue has as well."""
    kept = open_log(folder, catalogue, LOG_BYTES_MIN)
    made = entries(count)
    for entry in made:
        kept.append([record_of(entry, None)])
    kept.close()
    catalogue.write(Batch(appends=[(entry, None) for entry in made[:known]]))


def rot(path: Path, entry: int) -> None:
    """In the head of the n-th record of the only segment."""
    segment = next(path.glob("*.log"))
    raw = bytearray(segment.read_bytes())
    at = -1
    for _ in range(entry):
        at = raw.index(ENTRY, at + 1)
    raw[at + 20] ^= 4
    segment.write_bytes(raw)


def test_what_the_log_has_and_the_catalogue_has_not_is_found(folder: LocalFolder, catalogue: Catalogue) -> None:
    filled(folder, catalogue)
    assert open_log(folder, catalogue, LOG_BYTES_MIN, alone=True).last == (1, 20)


@pytest.mark.parametrize("entry", [8, 19])
def test_rot_before_the_tail_is_told(folder: LocalFolder, catalogue: Catalogue, entry: int) -> None:
    filled(folder, catalogue)
    rot(folder.path, entry)
    with pytest.raises(LogDamaged, match=rf"entry {entry} can't be read.*rebuild-index"):
        open_log(folder, catalogue, LOG_BYTES_MIN, alone=True)
    assert catalogue.meta("store_id", "") == "this"


@pytest.mark.parametrize("alone", [False, True])
def test_an_empty_folder_is_waited_for(folder: LocalFolder, catalogue: Catalogue, alone: bool) -> None:
    """A disk that is mounted later."""
    filled(folder, catalogue)
    shutil.move(folder.path, folder.path.with_name("away"))
    with pytest.raises(LogAway, match="another folder"):
        open_log(LocalFolder(folder.path), catalogue, LOG_BYTES_MIN, alone=alone)
    assert catalogue.meta("store_id", "") == "this"


def test_in_a_pair_the_node_begins_anew_as_a_stranger(folder: LocalFolder, catalogue: Catalogue) -> None:
    filled(folder, catalogue)
    rot(folder.path, 8)
    kept = open_log(folder, catalogue, LOG_BYTES_MIN)
    assert kept.last == catalogue.epochs.last == (1, 5)
    assert (catalogue.meta("store_id", "?"), catalogue.meta("whole", True)) == ("", False)
    assert len(set_aside_before(folder)) == 1
    kept.append([record_of(entry, None) for entry in entries(7)[5:]])
    kept.close()
    assert open_log(folder, catalogue, LOG_BYTES_MIN).last == (1, 7)


def test_a_log_of_nobody_is_kept_aside(folder: LocalFolder, catalogue: Catalogue) -> None:
    """After the catalogue was lost: its log may have what nothing else has."""
    filled(folder, catalogue)
    catalogue.write(Batch(meta={"log": ""}))
    open_log(folder, catalogue, LOG_BYTES_MIN).close()
    assert len(set_aside_before(folder)) == 1


def test_a_log_that_begins_behind_the_catalogue_is_not_its_own(folder: LocalFolder, catalogue: Catalogue) -> None:
    filled(folder, catalogue)
    kept = open_log(folder, catalogue, LOG_BYTES_MIN)
    kept.begin(kept.lineage, ((1, 9),))
    kept.close()
    with pytest.raises(LogDamaged, match="begins with entry 10"):
        open_log(folder, catalogue, LOG_BYTES_MIN, alone=True)


def test_a_catalogue_without_a_log_gets_one_that_ends_where_it_does(folder: LocalFolder, tmp_path: Path) -> None:
    old = Catalogue.open(tmp_path / "old", 1 << 26)
    old.write(Batch(appends=[(entry, None) for entry in entries(9)], meta={"format": 2, "lineage": "it"}))
    bring_up_to_date(old, "")
    assert old.meta("format", 0) == FORMAT
    kept = open_log(folder, old, LOG_BYTES_MIN, alone=True)
    assert (kept.first, kept.last, kept.epochs) == (10, (1, 9), ((1, 9),))
    old.close()


# -- a whole gateway ---------------------------------------------------------------------------------------------------


def only_logged(gateway: Gateway) -> None:
    """As after a power cut that took all from the volume that wasn't synced yet."""
    stored(gateway)
    gateway.stop(signal.SIGKILL)
    shutil.rmtree(gateway.volume / "archive")
    (gateway.volume / "archive").mkdir()
    for file in (gateway.volume / "spool").iterdir():
        file.unlink()


def refused(gateway: Gateway) -> str:
    done = tandem("gateway", "--data", str(gateway.folder), "--port", "1")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "can't start" in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_log_that_is_away_is_waited_for(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    stored(gateway)
    gateway.stop(signal.SIGKILL)
    path = gateway.folder / "state" / "log"
    path.rename(path.with_name("elsewhere"))
    assert "another folder" in refused(gateway)
    shutil.rmtree(path, ignore_errors=True)
    path.with_name("elsewhere").rename(path)
    gateway.start()
    assert gateway.status()["instances"] == 5


def test_what_only_the_log_has_is_written_again(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    only_logged(gateway)
    gateway.start()
    wait_for(lambda: len(files_of(gateway)) == 5, "all files to be back")


def torn(gateway: Gateway) -> None:
    for file in files_of(gateway):
        file.write_bytes(file.read_bytes()[:100])


def test_a_rebuild_takes_from_the_log_what_the_power_has_torn(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    stored(gateway)
    gateway.stop(signal.SIGKILL)
    torn(gateway)
    assert rebuilt(gateway)["instances"] == 5
    gateway.start()
    assert order(gateway.folder / "standalone.sock", "scrub", {})["bad"] == 0
    assert gateway.status()["catch_up"]["missing"] == 0


@pytest.mark.parametrize("deleted", [True, False])
def test_a_rebuild_takes_the_newest_from_the_log(new_gateway: Callable[..., Gateway], deleted: bool) -> None:
    """Stored again after a deletion, or replaced, when the old catalogue didn't see it any more."""
    gateway = new_gateway()
    uids = {name: str(generate_uid()) for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")}
    first, again = item(PatientComments="first", **uids), item(PatientComments="second, and longer", **uids)
    with gateway.client(first) as client:
        assert client.store(first) == 0
    if deleted:
        given = {"study": uids["StudyInstanceUID"], "by": "test", "reason": "test"}
        assert order(gateway.folder / "standalone.sock", "delete", given) == {"deleted": 1}
    gateway.stop()
    saved = gateway.folder / "saved"
    shutil.copytree(gateway.folder / "state" / "catalogue", saved)
    gateway.start()
    with gateway.client(again) as client:
        assert client.store(again) == 0
    gateway.stop(signal.SIGKILL)
    shutil.rmtree(gateway.folder / "state" / "catalogue")
    saved.rename(gateway.folder / "state" / "catalogue")
    for file in gateway.volume.rglob("*.dcm"):
        if b"second" in file.read_bytes():
            file.unlink()
    rebuilt(gateway)
    gateway.start()
    wait_for(lambda: any(b"second" in file.read_bytes() for file in files_of(gateway)), "the newest to be there")
    assert gateway.status()["instances"] == 1
    assert gateway.status()["catch_up"]["missing"] == 0


@pytest.mark.parametrize("catalogue_is_there", [True, False])
def test_a_rebuild_takes_what_can_be_read_of_a_damaged_log(
    new_gateway: Callable[..., Gateway], catalogue_is_there: bool
) -> None:
    gateway = new_gateway()
    only_logged(gateway)
    rot(gateway.folder / "state" / "log", 2)
    if catalogue_is_there:
        assert "rebuild-index" in refused(gateway)
    else:
        shutil.rmtree(gateway.folder / "state" / "catalogue")
    assert rebuilt(gateway)["instances"] == 4
    gateway.start()
    assert gateway.status()["instances"] == 4
    wait_for(lambda: len(files_of(gateway)) == 4, "the files to be in the tree")


@pytest.mark.parametrize("alone", [True, False])
def test_a_newer_versions_log_is_left_alone(folder: LocalFolder, catalogue: Catalogue, alone: bool) -> None:
    """In a pair, too: it isn't damaged, and setting it aside would make a stranger of the node."""
    filled(folder, catalogue)
    for segment in folder.path.glob("*.log"):
        raw = bytearray(segment.read_bytes())
        raw[3:4] = b"2"
        segment.write_bytes(raw)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(LogUnknown, match="format 2"):
        open_log(folder, catalogue, LOG_BYTES_MIN, alone=alone)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before
