"""`tandem import`: folders of DICOM files into the archive, over C-STORE, byte for byte.

Every file's fate goes to a journal as it is known; run again with the same journal, what was stored is passed over.
A failover in between only makes it wait.
"""

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from tools.cli.dicom_client import AssociationFailed, DicomClient, FileObject, NotLetIn, Unreadable
from tools.cli.dicom_files import NotAnInstance, open_object

CALLING: Final = "TANDEM_TOOLS"
TIMEOUT_S: Final = 60.0
BATCH: Final = 100  # files over one association
PATIENCE_S: Final = 120.0  # for a primary to answer
RETRY_S: Final = 1.0
OUT_OF_RESOURCES: Final = 0xA700
TRANSIENT: Final = (OUT_OF_RESOURCES, 0x0110)  # Processing Failure
MEANINGS: Final = {
    0x0111: "other bytes are stored under its SOP Instance UID",
    0x0122: "its SOP class isn't taken",
    0xA900: "its data set is damaged, or isn't what its file says that it is",
    0xC000: "its data set can't be understood",
}

Key = tuple[str, int, int]  # path, size, time of the last change


@dataclass(frozen=True)
class Fate:
    """What became of a file: `why` is empty if it is stored."""

    key: Key
    sop_instance: str
    why: str
    later: bool = False  # it may be taken later


class Unreachable(Exception):
    """Nobody takes the files."""


class Notes(Protocol):
    """Which files were stored before, and what becomes of the others."""

    stored: set[Key]

    def note(self, fate: Fate) -> None: ...


class Nowhere:
    """Nothing was stored before, and nothing is noted."""

    def __init__(self) -> None:
        self.stored: set[Key] = set()

    def note(self, fate: Fate) -> None:
        pass


class Journal:
    """One JSON object a line: file, size, changed, sop_instance, why."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stored: set[Key] = set()
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # the last line of a run that was cut off
                if not row["why"]:
                    self.stored.add((row["file"], row["size"], row["changed"]))
        self._file = path.open("a", encoding="utf-8")

    def note(self, fate: Fate) -> None:
        file, size, changed = fate.key
        row = {"file": file, "size": size, "changed": changed, "sop_instance": fate.sop_instance, "why": fate.why}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Target:
    host: str
    port: int
    aet: str
    user: tuple[str, str] | None = None  # name and password to log in with
    calling: str = CALLING
    patience_s: float = field(default_factory=lambda: PATIENCE_S)  # for a primary to answer


def files_below(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(one for one in path.rglob("*") if one.is_file())
        else:
            yield path


def key_of(path: Path) -> Key:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def bring_in(
    paths: list[Path], target: Target, journal: Notes, workers: int, progress: Callable[[], None]
) -> tuple[Counter[str], list[Fate]]:
    """Store files over `workers` associations. Returns counts ("stored", "known", "refused") and what was refused.
    Raises Unreachable."""
    counts: Counter[str] = Counter()
    refused: list[Fate] = []
    batches: queue.SimpleQueue[list[Path]] = queue.SimpleQueue()
    for at in range(0, len(paths), BATCH):
        batches.put(paths[at : at + BATCH])
    lock, failures = threading.Lock(), list[Exception]()

    def done(fate: Fate | None) -> None:
        with lock:
            if fate is None:
                counts["known"] += 1
            else:
                journal.note(fate)
                counts["refused" if fate.why else "stored"] += 1
                if fate.why:
                    refused.append(fate)
            progress()

    def work() -> None:
        try:
            while not failures:
                _store_batch(batches.get_nowait(), target, journal, done)
        except queue.Empty:
            return
        except Exception as error:  # Unreachable, or something nobody thought of: no file's fate is made up
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return counts, refused


def _store_batch(paths: list[Path], target: Target, journal: Notes, done: Callable[[Fate | None], None]) -> None:
    client: DicomClient | None = None
    try:
        for path in paths:
            try:
                key = key_of(path)
            except OSError as error:
                done(Fate((str(path), 0, 0), "", error.strerror or "can't be read", later=True))
                continue
            if key in journal.stored:
                done(None)
                continue
            try:
                item = open_object(path)
            except NotAnInstance as error:
                done(Fate(key, "", str(error)))
                continue
            except OSError as error:
                done(Fate(key, "", error.strerror or "can't be read", later=True))
                continue
            client, why, status = _store(item, target, client)
            done(Fate(key, item.sop_instance, why, later=status in TRANSIENT))
    finally:
        if client:
            client.close()


def _store(item: FileObject, target: Target, client: DicomClient | None) -> tuple[DicomClient | None, str, int]:
    """(the association, why it was refused, with which status). Tries again while there is no primary."""
    context = (item.sop_class, item.transfer_syntax)
    deadline = time.monotonic() + target.patience_s
    while True:
        try:
            if client is None or context not in client.contexts:
                known = list(client.contexts) if client else []
                if client:
                    client.close()
                known = [*known[-99:], context]
                client = DicomClient(
                    target.host, target.port, target.aet, known, TIMEOUT_S, calling=target.calling, user=target.user
                )
            if context not in client.contexts:
                return client, "the SOP class or transfer syntax isn't taken", 0
            status = client.store(item)
            if status != OUT_OF_RESOURCES or time.monotonic() > deadline:
                meaning = f": {MEANINGS[status]}" if status in MEANINGS else ""
                return client, f"refused with status 0x{status:04X}{meaning}" if status else "", status
        except Unreadable as error:
            if client:
                client.close()  # in the middle of a message
            return None, str(error), OUT_OF_RESOURCES
        except (OSError, AssociationFailed) as error:
            if client:
                client.close()
            client = None
            if isinstance(error, NotLetIn) or time.monotonic() > deadline:
                raise Unreachable(f"{target.host}:{target.port} doesn't take files: {error}") from error
        time.sleep(RETRY_S)
