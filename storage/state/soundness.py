"""Is a catalogue that wasn't closed properly readable as a whole?

    python -m storage.state.soundness FOLDER

reads every row and exits 0 if all of them can be decoded. It is a process of its own because a torn page may end it.
"""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

OPEN_MARK: Final = "open"  # a file that is there while a gateway has the catalogue open
MAP_BYTES: Final = 1 << 40
RAW: Final = (  # tables whose rows aren't MessagePack
    *("missing", "kept", "number", "copies", "words", "blocks"),
    *("modalities", "texts", "numbered", "study_number"),
    *("file_names", "file_listing", "file_xattrs", "file_counters", "file_unlooked", "file_entries"),
    *("file_copies", "file_gone"),
)
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class CheckEnded(OSError):
    """Something ended the check before it was done: nothing is known of the catalogue."""


def is_unclean(catalogue: Path) -> bool:
    """It was open when the machine went down; the end of a process alone tears no pages."""
    mark = catalogue / OPEN_MARK
    return mark.exists() and mark.read_text() != _boot()


def opened(catalogue: Path) -> None:
    """To be said once it is known to be sound: an end of the check must not make it look so."""
    catalogue.mkdir(parents=True, exist_ok=True)
    (catalogue / OPEN_MARK).write_text(_boot())


def _boot() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""


def closed(catalogue: Path) -> None:
    (catalogue / OPEN_MARK).unlink(missing_ok=True)


def is_sound(catalogue: Path) -> bool:
    """False for what can't be decoded and for pages that end the reading process. Raises CheckEnded."""
    done = subprocess.run([sys.executable, "-m", "storage.state.soundness", str(catalogue)], stdin=subprocess.DEVNULL)
    if done.returncode in (-signal.SIGKILL, -signal.SIGTERM):
        raise CheckEnded(0, "the check of the catalogue was ended from outside; start again")
    return done.returncode == 0


def _read_all(catalogue: Path) -> None:
    import lmdb

    from storage.state.catalogue import TABLES

    env = lmdb.open(str(catalogue), map_size=MAP_BYTES, max_dbs=len(TABLES), readonly=True, lock=False)
    with env.begin() as txn:
        for name in TABLES:
            try:
                table = env.open_db(name.encode(), txn=txn, create=False)
            except lmdb.NotFoundError:  # of a newer format than this catalogue has
                continue
            rows = 0
            with txn.cursor(table) as cursor:
                for _, value in cursor:
                    rows += 1
                    if value and name not in RAW:
                        msgspec.msgpack.decode(value)
            if rows != txn.stat(table)["entries"]:
                raise ValueError(f"{name} has lost rows")


if __name__ == "__main__":
    _read_all(Path(sys.argv[1]))
