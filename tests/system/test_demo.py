"""What a newcomer runs first finds everything as it should be."""

from pathlib import Path

from tests.system.conftest import renew
from tools.lab.demo import Report, demo
from tools.lab.pair import Lab


def test_the_demo_finds_nothing_wrong(lab: Lab, tmp_path: Path) -> None:
    renew(lab)  # it counts what it stores
    report = Report()
    demo(lab, tmp_path, report)
    assert report.ok, report.rows
