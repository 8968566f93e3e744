"""What was refused, replaced, deleted, diverged or found damaged: files in each volume's quarantine, with notes."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from storage.objects.volume import Volume
from storage.state.changes import DIVERGED

__all__ = ["DIVERGED", "amend", "kept", "purge"]


def kept(volumes: Iterable[Volume]) -> list[dict[str, Any]]:
    """Each object with `id`, `file`, `bytes`, `since` (seconds since the epoch), `reason` and what else its note says.
    Blocks."""
    found = []
    for volume in volumes:
        for note in sorted((volume.path / "quarantine").glob("*.json")):
            file = note.with_suffix(".dcm")
            if file.exists():
                about = _read(note)
                about.pop("was", None)  # names a patient's folder
                row = {"id": note.stem, "file": str(file), "bytes": file.stat().st_size, "since": note.stat().st_mtime}
                found.append(row | about)
    return found


def _read(note: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        return {"reason": "its note was lost with the power"}
    return about


def amend(one: dict[str, Any], **more: str) -> None:
    """Add to the note of an object. Blocks."""
    note = Path(one["file"]).with_suffix(".json")
    note.write_text(json.dumps({**_read(note), **more}, indent=1), encoding="utf-8")


def purge(one: dict[str, Any]) -> None:
    """Delete an object for good. Blocks."""
    file = Path(one["file"])
    file.unlink(missing_ok=True)
    file.with_suffix(".json").unlink(missing_ok=True)
