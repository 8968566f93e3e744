"""The architecture's rules hold in the source, and the rules themselves can fail."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.dev import structure


def test_rules_hold() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.dev.structure"], cwd=structure.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("ha/decide.py", "import time", "a pure core must not import time"),
        ("gateway/x.py", "load(path)", "only entry points load settings"),
    ],
)
def test_rules_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, complaint: str) -> None:
    monkeypatch.setattr(structure, "ROOT", tmp_path)
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text(source)
    assert any(complaint in problem for problem in structure.problems_in(path))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("storage/x.py", "import gateway.dimse.server"),
        ("gateway/x.py", "import ha.agent"),
        ("ha/x.py", "import storage.store"),
        ("gateway/dimse/x.py", "import storage.engine"),
        ("gateway/archive/x.py", "import gateway.dimse.server"),
        ("gateway/dicom/dimse.py", "if TYPE_CHECKING:\n    import gateway.archive.find"),
    ],
)
def test_arrows_are_seen(tmp_path: Path, name: str, source: str) -> None:
    """Import-linter says so, also of an arrow that is there for types alone."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for package in structure.PACKAGES:
        subprocess.run(["cp", "-r", str(structure.ROOT / package), str(copy)], check=True)
    (copy / "pyproject.toml").write_text((structure.ROOT / "pyproject.toml").read_text())
    with (copy / name).open("a") as file:
        file.write("\n" + source + "\n")
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout
    assert "BROKEN" in done.stdout
