"""One folder that shows the readable trees of all volumes as one, for the share: a link for every study.

It holds nothing of its own and is made anew at each start.
"""

import shutil
from pathlib import Path
from typing import Protocol


class Showing(Protocol):
    """Told of each study that comes to lie somewhere."""

    def show(self, study: str, target: Path) -> None: ...


class View:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._shown: dict[str, Path] = {}

    def rebuild(self, archives: list[Path]) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        self._shown.clear()
        for archive in archives:
            for study in archive.glob("*/*"):
                self.show(str(study.relative_to(archive)), study)

    def show(self, study: str, target: Path) -> None:
        """Link patient/study to where it lies. A study that lies on two volumes gets a second name."""
        known = self._shown.get(study)
        if known == target:
            return
        name = study
        number = 2
        while known is not None:
            name = f"{study}~{number}"
            number += 1
            known = self._shown.get(name)
            if known == target:
                return
        link = self.path / name
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target)
        self._shown[name] = target
