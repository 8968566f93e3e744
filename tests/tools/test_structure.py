"""The architecture's rules hold in the source, and the rules themselves can fail."""

from pathlib import Path

import pytest

from tools import structure


def test_rules_hold() -> None:
    paths = [path for package in structure.PACKAGES for path in (structure.ROOT / package).rglob("*.py")]
    assert [problem for path in paths for problem in structure.problems_in(path)] == []


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("storage/x.py", "from gateway.server import DicomServer", "storage must not import gateway.server"),
        ("gateway/x.py", "import ha.agent", "gateway must not import ha.agent"),
        ("ha/x.py", "from storage.store import Store", "ha must not import storage.store"),
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
