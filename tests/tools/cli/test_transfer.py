"""`tandem import` and `tandem export`: folders in, file-sets out, nothing changed on the way."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread, dcmwrite
from pydicom.fileset import FileSet

from gateway.archive.users import hash_password, is_password
from tests.builders import dataset
from tests.conftest import ROOT, Gateway
from tools.cli import importing
from tools.cli.dicom_client import FileObject, Unreadable
from tools.cli.dicom_files import open_object, read_object
from tools.lab.samples import copies, distinct_files, sop_instance


def tandem(*arguments: object, given: str = "", code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tools", *map(str, arguments)],
        cwd=ROOT,
        input=given.encode(),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr.decode()[-2000:]
    return done.stdout.decode()


def config(gateway: Gateway) -> Path:
    """Settings that name the running gateway."""
    file = gateway.folder.parent / "node.toml"
    file.write_text(f'[node]\nrun_dir = "{gateway.folder}"\n[dicom]\nport = {gateway.port}\n')
    return file


def imported(gateway: Gateway, journal: Path, *paths: Path, code: int = 0) -> dict[str, Any]:
    output = tandem("import", "--config", config(gateway), "--json", "--journal", journal, *paths, code=code)
    found: dict[str, Any] = json.loads(output)
    return found


def test_import_where_users_are_asked_for(
    new_gateway: Callable[..., Gateway], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = new_gateway(TANDEM__DICOM__USERS=f'{{ archivist = "{hash_password(b"secret", b"salt")}" }}')
    copies(tmp_path / "cd", 2)
    for user, code in (("", 3), ("nobody", 3), ("archivist", 0)):
        monkeypatch.setenv("TANDEM_USER", user)
        monkeypatch.setenv("TANDEM_PASSWORD", "secret")
        tandem("import", "--config", config(gateway), "--journal", tmp_path / "notes", tmp_path / "cd", code=code)
    assert gateway.status()["instances"] == 2


def test_import_by_a_node_that_is_not_let_in_ends_at_once(new_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    gateway = new_gateway(TANDEM__DICOM__CALLING_AETS='["CT1"]')
    copies(tmp_path / "cd", 1)
    done = subprocess.run(
        [sys.executable, "-m", "tools", "import", "--config", str(config(gateway)), str(tmp_path / "cd")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3
    assert "our AE title isn't let in; we call as TANDEM_TOOLS" in done.stderr


def test_import_says_what_became_of_every_file(new_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    gateway, journal = new_gateway(), tmp_path / "journal.jsonl"
    folder = tmp_path / "cd"
    copies(folder / "a" / "b", 30)
    (folder / "readme.txt").write_text("no image")
    (folder / "empty").touch()
    (folder / "DICOMDIR").write_bytes(bytes(200))
    first = imported(gateway, journal, folder, code=4)
    assert (first["files"], first["stored"], first["known"], first["refused"]) == (33, 30, 0, 3)
    assert gateway.status()["instances"] == 30
    again = imported(gateway, journal, folder, code=4)
    assert (again["stored"], again["known"], again["refused"]) == (0, 30, 3)
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    refused = {Path(row["file"]).name: row["why"] for row in rows if row["why"]}
    assert set(refused) == {"readme.txt", "empty", "DICOMDIR"}


def test_import_goes_on_where_it_was_cut_off(new_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    gateway, journal = new_gateway(), tmp_path / "journal.jsonl"
    folder = tmp_path / "files"
    copies(folder, 40)
    paths = sorted(folder.iterdir())
    imported(gateway, journal, *paths[:15])
    with journal.open("a") as file:
        file.write('{"file": "/cut off')
    gateway.stop(signal.SIGKILL)
    gateway.start()
    again = imported(gateway, journal, folder)
    assert (again["stored"], again["known"]) == (25, 15)
    assert gateway.status()["instances"] == 40


def test_import_to_nobody_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    copies(tmp_path / "files", 1)
    monkeypatch.setattr("tools.cli.importing.PATIENCE_S", 0.5)
    from click.testing import CliRunner

    from tools.cli.main import main

    journal = str(tmp_path / "j.jsonl")
    done = CliRunner().invoke(main, ["import", "--to", "127.0.0.1:1", "--journal", journal, str(tmp_path / "files")])
    assert done.exit_code == 3
    assert "run it again" in done.output


def test_export_is_a_file_set_with_the_same_data_sets(new_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    gateway = new_gateway()
    originals = {sop_instance(path): path for path in distinct_files()}
    imported(gateway, tmp_path / "j.jsonl", *originals.values(), code=4)
    rows = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    refused = [row["sop_instance"] for row in rows if row["why"]]
    assert len(refused) == 1  # bad_sequence.dcm, whose data set can't be read
    del originals[refused[0]]
    studies = {str(dcmread(path, specific_tags=["StudyInstanceUID"]).StudyInstanceUID) for path in originals.values()}
    target = tmp_path / "out"
    asked = [text for study in sorted(studies) for text in ("--study", study)]
    output = json.loads(tandem("export", "--config", config(gateway), "--json", *asked, target))
    assert output["instances"] == len(originals)
    found = {str(one.SOPInstanceUID): Path(one.path) for one in FileSet(target / "DICOMDIR")}
    found |= {path.stem: path for path in (target / "NOT_IN_DICOMDIR").iterdir()}
    assert set(found) == set(originals)
    assert len(output["not_in_dicomdir"]) < 10
    for uid, path in found.items():
        assert read_object(path).data == read_object(originals[uid]).data
    tandem("export", "--config", config(gateway), "--study", "1.2.3", tmp_path / "none", code=1)
    tandem("export", "--config", config(gateway), "--study", "1.2.3", target, code=2)


def test_hash_password() -> None:
    kept = tandem("hash-password", given="secret\n").strip()
    assert is_password(b"secret", kept)
    assert not is_password(b"other", kept)


def test_one_bad_file_does_not_end_an_import(
    new_gateway: Callable[..., Gateway], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a scratched CD has them: it can be opened, and not be read to its end."""
    gateway = new_gateway()
    paths = copies(tmp_path / "cd", 3)
    opened, bad = importing.open_object, paths[1]

    def shorter(path: Path) -> FileObject:
        found = opened(path)
        return dataclasses.replace(found, length=found.length + 1) if path == bad else found

    monkeypatch.setattr(importing, "open_object", shorter)
    target = importing.Target("127.0.0.1", gateway.port, "TANDEM")
    counts, refused = importing.bring_in(paths, target, importing.Journal(tmp_path / "notes"), 1, lambda: None)
    assert (counts["stored"], counts["refused"]) == (2, 1)
    assert "shorter" in refused[0].why


def test_a_file_is_sent_in_pieces(new_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    """However long it is; one that becomes shorter on the way is never sent as if it were whole."""
    gateway = new_gateway()
    file = tmp_path / "long.dcm"
    dcmwrite(file, dataset(PixelData=bytes(5 << 20)), enforce_file_format=False, implicit_vr=False, little_endian=True)
    found, whole = open_object(file), read_object(file)
    sizes = [len(block) for block in found.blocks(1 << 20)]
    assert max(sizes) == 1 << 20
    assert b"".join(found.blocks(1 << 20)) == whole.data
    with gateway.client(whole) as client, pytest.raises(Unreadable, match="shorter"):
        client.store(dataclasses.replace(found, length=found.length + 1))
    assert gateway.status()["instances"] == 0
    with gateway.client(whole) as client:
        assert client.store(found) == 0
    assert gateway.status()["instances"] == 1
