"""After the machine went down the whole catalogue is read: a sound one passes, whatever rows it has."""

from pathlib import Path

from storage.state.catalogue import Batch, Catalogue
from storage.state.file_model import ROOT, BeginWriting, Change, Flush, Held, Lacks, Make, Remove, SetUser, SetXattr
from storage.state.file_rows import FIRST
from storage.state.files import NUMBERS_SKIPPED
from storage.state.model import Delete, Entry, Files, IndexFile, Location, Operation, Put, Task
from storage.state.soundness import is_sound

MB = 1 << 20
NUMBER = FIRST + NUMBERS_SKIPPED  # of the first file
FILES: tuple[Change, ...] = (
    BeginWriting("3f9a01c2"),
    Make(ROOT, b"a.dcm", 0o100644, 0, 0, 1, dirty=True),
    Make(ROOT, b"b.dcm", 0o100644, 0, 0, 1),
    Make(ROOT, b"c.dcm", 0o100644, 0, 0, 1, dirty=True),
    Make(ROOT, b"folder", 0o40755, 0, 0, 1),
    Flush(NUMBER, 100, 1, 1, clean=True, lacking=("b",)),
    Held(NUMBER, "b", "5b1d0e77"),
    Held(NUMBER + 1, "a", "99887766"),
    Lacks(NUMBER, "a"),
    SetXattr(NUMBER, b"user.DOSATTRIB", b"\0\0\5\0", 1),
    SetUser("pacs", bytes(range(16)), 1, is_new=True),
    Remove(ROOT, b"b.dcm", False, 1),
    Remove(ROOT, b"c.dcm", False, 1, held=True),
)


def put(number: int, blocks: bytes = b"") -> Put:
    keys = {"PatientID": f"P{number}"}
    return Put(f"1.9.{number}", "1.4", "1.2", "1.3", "1.5", bytes(16), 100, 60, keys, "CT", 1.0, blocks=blocks)


def test_every_table(tmp_path: Path) -> None:
    catalogue = Catalogue.open(tmp_path / "catalogue", 16 * MB)
    operations: list[Operation] = [*(Files(change) for change in FILES)]
    operations.append(IndexFile(NUMBER, 6, put(1)))
    operations += [put(2, bytes(32)), put(3), Delete("1.2", "", "1.9.3", "why", "", 0.0)]
    operations.append(Task("id", "kind", "AE", b"", 1.0))
    for seq, operation in enumerate(operations, 1):
        location = Location("a6b1", f"{seq}", "P/study/1.dcm") if isinstance(operation, Put) else None
        catalogue.write(Batch(appends=[(Entry(1, seq, operation), location)]))
        catalogue.write(Batch(applies=[(Entry(1, seq, operation), location)]))
    catalogue.write(Batch(lost={15: ("its disk", Location("a6b1", "15", "P/study/1.dcm"))}))
    with catalogue.kv.read() as txn:
        assert txn.count("file_images") and txn.count("file_copies") and txn.count("file_gone") == 1
    catalogue.close()
    assert is_sound(tmp_path / "catalogue")
