"""`tandem inbox`: what is put into a folder of the share is taken into the archive.

A file is taken when nobody has it open and it hasn't changed for a moment. It is moved aside first, so that a new one
of its name is another file; stored over C-STORE, so that it is on both nodes before it goes; and only then removed.
What can't be stored is moved to `rejected/`, with a text file that says why. Whatever ends this process in between, the
next one goes on with what lies aside: the same bytes twice are stored once.
"""

import contextlib
import os
import shutil
import signal
import stat
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import click
import structlog

from conf.mounts import files_at
from conf.settings import Settings
from tools.cli.dicom_files import MediaDirectory, NotAnInstance, is_cut_short
from tools.cli.exits import EXIT_CONFIG
from tools.cli.importing import Fate, Nowhere, Target, Unreachable, bring_in
from tools.cli.options import Failure, config_option, dicom_host, login, settings_of

log = structlog.get_logger()

REJECTED: Final = "rejected"
TAKEN: Final = ".taken"  # what is being stored: nobody else touches it
CALLING: Final = "INBOX"
OPEN: Final = "user.tandem.open"  # how often a file of the share is open
LOOK_S: Final = 1.0
PATIENCE_S: Final = 10.0  # for a primary to answer
FOLDER_QUIET_S: Final = 60.0  # an empty folder is removed after this: whoever copies a tree makes its folders first
AT_ONCE: Final = 200
LITTER: Final = frozenset({"desktop.ini", "thumbs.db", ".ds_store"})  # left behind by Windows and macOS
WORKERS: Final = 2
ZIP: Final = b"PK\x03\x04"
NAME_BYTES_MAX: Final = 228
SETTLED, LATER, ONLY_HERE = "settled", "later", "only here"  # of what is in a ZIP
STEP_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """Of one file: `why` is empty if it is stored; `later`: it may be taken later; `dropped`: nobody misses it."""

    why: str = ""
    later: bool = False
    dropped: bool = False


DIRECTORY: Final = Outcome(dropped=True)
CUT: Final = Outcome("It ends in the middle of its data: copying it was broken off. Put it here again.")


class Inbox:
    def __init__(self, folder: Path, target: Target, quiet_s: float, largest_bytes: int) -> None:
        """`folder`: exists, on the mounted share or any other file system."""
        self._folder, self._target, self._quiet_s, self._largest_bytes = folder, target, quiet_s, largest_bytes
        self._taken = folder / TAKEN
        self._seen: dict[Path, tuple[tuple[int, ...], float]] = {}  # as it was, and since when
        self._seen_now: set[Path] = set()
        self.stored = self.rejected = 0

    def turn(self) -> int:
        """Take what is at rest; returns how many files were stored or rejected. Raises OSError or Unreachable."""
        self._taken.mkdir(exist_ok=True)
        before = self.stored + self.rejected
        self._seen_now = set()
        left_over = [path for path in self._below(self._taken) if self._is_at_rest(path)]
        found = [path for path in self._below(self._folder) if self._is_at_rest(path)]
        self._remove_empty_folders()
        self._seen = {path: seen for path, seen in self._seen.items() if path in self._seen_now}
        self._settle([(path, Path(*path.relative_to(self._taken).parts[1:])) for path in left_over[:AT_ONCE]])
        self._settle([aside for path in found[:AT_ONCE] if (aside := self._set_aside(path)) is not None])
        return self.stored + self.rejected - before

    # -- what is to be taken -----------------------------------------------------------------------------------

    def _below(self, top: Path, *, folders: bool = False) -> Iterator[Path]:
        """All files there, or all folders, those in them first."""
        left, found = [top], list[Path]()
        while left:
            folder = left.pop()
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                if folder == self._folder and entry.name in (REJECTED, TAKEN):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    left.append(Path(entry.path))
                    found.append(left[-1])
                elif not folders:
                    yield Path(entry.path)
        if folders:
            yield from reversed(found)

    def _is_at_rest(self, path: Path) -> bool:
        """It was the same for long enough: by our own clock, since times are whoever's who set them."""
        try:
            status = path.lstat()
        except FileNotFoundError:
            return False
        is_folder = stat.S_ISDIR(status.st_mode)
        now, stamp = time.monotonic(), (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        self._seen_now.add(path)
        was, since = self._seen.get(path, ((), now))
        since = now if was != stamp else since
        is_quiet = now - since >= (FOLDER_QUIET_S if is_folder else self._quiet_s)
        if is_quiet and not is_folder and is_open(path):
            is_quiet, since = False, now
        self._seen[path] = (stamp, since)
        return is_quiet

    def _set_aside(self, path: Path) -> tuple[Path, Path] | None:
        """(where it is now, its name below the inbox); None if somebody uses it after all."""
        name = path.relative_to(self._folder)
        try:
            before = path.lstat()
            aside = self._taken / str(before.st_ino) / name  # where nothing lies
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, aside)
        except OSError as error:
            log.warning("inbox.left", file=str(name), why=error.strerror)
            return None
        after = aside.lstat()
        if is_open(aside) or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            with contextlib.suppress(FileExistsError):  # else it is taken from here, once it is at rest
                os.link(aside, path, follow_symlinks=False)
                aside.unlink()
            return None
        return aside, name

    # -- what becomes of it ------------------------------------------------------------------------------------

    def _settle(self, files: list[tuple[Path, Path]]) -> None:
        plain: list[tuple[Path, Path]] = []
        for path, name in files:
            kind = kind_of(path)
            if kind == "zip":
                self._settle_zip(path, name)
            elif kind == "litter":
                path.unlink()
            elif kind == "file":
                plain.append((path, name))
            else:
                self._reject(path, name, f"It is {kind}, and no file.")
        for (path, name), outcome in zip(plain, self._store([path for path, _ in plain]), strict=True):
            if outcome.later:
                continue
            if outcome.why:
                self._reject(path, name, outcome.why)
            else:
                path.unlink()
                self._note(outcome, name)

    def _note(self, outcome: Outcome, name: Path) -> None:
        if not outcome.dropped:
            self.stored += 1
            log.info("inbox.stored", file=str(name))

    def _store(self, paths: list[Path]) -> list[Outcome]:
        """Raises Unreachable."""
        known = {path: outcome for path in paths if (outcome := looked_at(path)) is not None}
        whole = [path for path in paths if path not in known]
        refused: list[Fate] = []
        if whole:
            _, refused = bring_in(whole, self._target, Nowhere(), min(WORKERS, len(whole)), lambda: None)
        why = {fate.key[0]: fate for fate in refused}
        return [known.get(path) or outcome_of(why.get(str(path.resolve())) or why.get(str(path))) for path in paths]

    def _reject(self, path: Path, name: Path, why: str) -> None:
        to = self._place(name)
        os.rename(path, to)
        self._explain(to, name, why)

    def _explain(self, to: Path, name: Path, why: str) -> None:
        said = f"{name}\n\nThis wasn't taken into the archive. {why}\n\nIt is kept here until somebody deletes it.\n"
        with_why = to.with_name(fitting(to.name, ".txt"))
        beside = to.with_name(f".why-{os.getpid()}")
        beside.write_bytes(said.replace("\n", "\r\n").encode("utf-8", "replace"))  # for Windows' Notepad, too
        os.rename(beside, with_why)
        self.rejected += 1
        log.warning("inbox.rejected", file=str(name), why=why)

    def _place(self, name: Path) -> Path:
        """A free one below `rejected`."""
        first = self._folder / REJECTED / name
        first.parent.mkdir(parents=True, exist_ok=True)
        place, number = first, 2
        while place.exists() or place.is_symlink():
            place = first.with_name(fitting(first.stem, f" ({number}){first.suffix}"))
            number += 1
        return place

    def _settle_zip(self, path: Path, name: Path) -> None:
        """Each file in it, as if it had been put here by itself, in a folder of the ZIP's name."""
        try:
            with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(prefix="tandem-inbox-") as scratch:
                fates = [self._settle_member(archive, member, name, Path(scratch)) for member in archive.infolist()]
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            self._reject(path, name, f"It is a ZIP file that can't be read: {error}.")
            return
        if LATER in fates:
            return
        if ONLY_HERE in fates:
            self._reject(path, name, "Some of what is in it can't be unpacked; a folder of its name says what.")
        else:
            path.unlink()

    def _settle_member(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: Path, scratch: Path) -> str:
        """LATER: it may be taken later; ONLY_HERE: it is nowhere else; SETTLED."""
        inside = name / safe(member.filename)
        if member.is_dir():
            return SETTLED
        extracted = scratch / "file"
        extracted.unlink(missing_ok=True)
        if member.flag_bits & 1:
            outcome = Outcome("It is encrypted: put it here without a password.")
        elif member.file_size > self._largest_bytes:
            outcome = Outcome(f"It is longer than {self._largest_bytes} bytes (max_object_bytes).")
        else:
            with archive.open(member) as source, extracted.open("wb") as target:
                while step := source.read(STEP_BYTES):  # not more than it says, whatever it says
                    target.write(step)
            kind = kind_of(extracted, Path(member.filename).name)
            if kind == "litter":
                return SETTLED
            outcome = self._store([extracted])[0] if kind == "file" else Outcome("It is a ZIP file in a ZIP file.")
        if outcome.later:
            return LATER
        if not outcome.why:
            self._note(outcome, inside)
            return SETTLED
        to = self._folder / REJECTED / inside
        to.parent.mkdir(parents=True, exist_ok=True)
        self._explain(to, inside, outcome.why)
        if not extracted.exists():
            return ONLY_HERE
        shutil.copyfile(extracted, to)
        return SETTLED

    def _remove_empty_folders(self) -> None:
        for folder in self._below(self._taken, folders=True):
            with contextlib.suppress(OSError):  # it isn't empty
                folder.rmdir()
        for folder in self._below(self._folder, folders=True):
            if self._is_at_rest(folder):
                with contextlib.suppress(OSError):
                    folder.rmdir()


def outcome_of(fate: Fate | None) -> Outcome:
    if fate is None:
        return Outcome()
    if fate.later:
        return Outcome(fate.why, later=True)
    return Outcome(f"{fate.why[:1].upper()}{fate.why[1:]}.")


def kind_of(path: Path, called: str = "") -> str:
    """zip, file, litter, or in words what it is instead. `called`: its name where it comes from."""
    mode, name = path.lstat().st_mode, called or path.name
    if not stat.S_ISREG(mode):
        return "a link" if stat.S_ISLNK(mode) else "something special"
    if name.lower() in LITTER or name.startswith("._"):
        return "litter"
    with path.open("rb") as file:
        return "zip" if file.read(len(ZIP)) == ZIP else "file"


def looked_at(path: Path) -> Outcome | None:
    """What becomes of it if that is known without storing it."""
    try:
        return CUT if is_cut_short(path) else None
    except MediaDirectory:
        return DIRECTORY  # the images that it names are taken by themselves
    except (NotAnInstance, OSError):
        return None  # why it can't be stored is found out when it is to be


def is_open(path: Path) -> bool:
    """Somebody has it open, as far as its file system says."""
    try:
        return os.getxattr(path, OPEN, follow_symlinks=False) != b"0"
    except OSError:
        return False


def fitting(name: str, end: str) -> str:
    """A name with an end, cut to what a file system takes: 228 bytes, so that it can be read over SMB."""
    room = NAME_BYTES_MAX - len(os.fsencode(end))
    return os.fsencode(name)[:room].decode("utf-8", "ignore") + end


def safe(name: str) -> Path:
    """A member's name as a path that leads nowhere else."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    return Path(*[part.replace("\0", "_") for part in parts] or ["_"])


@click.command()
@config_option
@click.option("--quiet", "quiet_s", default=3.0, show_default=True, help="Seconds that a file must be unchanged.")
def inbox(config: Path | None, quiet_s: float) -> None:
    """Take what is put into the share's inbox into the archive, until this is ended.

    Files, folders of them, ZIP files and whole media with DICOMDIR, over SMB or from the mount. What is stored on both
    nodes vanishes; what can't be stored goes to rejected/, beside a .txt that says why. Works on the primary, and waits
    on the standby. Needs `tandem mount`.
    """
    from tools.cli.main import configure_log

    settings = settings_of(config)
    configure_log(settings)
    if not settings.share.takes_in:
        raise Failure("[share] inbox or files is empty: there is none", EXIT_CONFIG)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    serve(settings, quiet_s, stop)


def serve(settings: Settings, quiet_s: float, stop: threading.Event) -> None:
    target = Target(dicom_host(settings), settings.dicom.port, settings.dicom.aet, login(), CALLING, PATIENCE_S)
    folder = settings.share.mount / settings.share.takes_in
    inbox = Inbox(folder, target, quiet_s, settings.dicom.max_object_bytes)
    said = ""
    while not stop.is_set():
        mount, done, why = files_at(settings.share.mount), 0, ""
        if mount is not None and mount.writable:
            try:
                for path in (folder, folder / REJECTED):
                    path.mkdir(mode=0o775, exist_ok=True)
                done = inbox.turn()
            except (OSError, Unreachable) as error:  # the node isn't the primary any more, perhaps
                why = str(error)
        if why and why != said:
            log.warning("inbox.waits", why=why)
        said = why
        if not done:
            stop.wait(LOOK_S)


COMMANDS: Final = (inbox,)
