"""`tandem inbox`: what is put into a folder of the share is taken into the archive.

A file is taken when nobody has it open and it hasn't changed for a moment. It is moved aside first, so that a new one
of its name is another file; stored over C-STORE, so that it is on both nodes before it goes; and only then removed.
What can't be stored is moved to `rejected/`, with a text file that says why. Whatever ends this process in between, the
next one goes on with what lies aside: the same bytes twice are stored once.
"""

import contextlib
import itertools
import os
import signal
import stat
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import structlog

from conf.mounts import OPEN, UNWRITTEN, files_at
from conf.settings import Settings
from storage.files.local import ends_in_hole
from tools.cli.dicom_files import MediaDirectory, NotAnInstance, is_cut_short
from tools.cli.exits import EXIT_CONFIG
from tools.cli.importing import Fate, Nowhere, Target, Unreachable, bring_in
from tools.cli.options import Failure, config_option, dicom_host, login, settings_of

log = structlog.get_logger()

REJECTED: Final = "rejected"
RECYCLED: Final = ".recycle"  # what a client has deleted, by a module of smbd's
TAKEN: Final = ".taken"  # what is being stored: nobody else touches it
CALLING: Final = "INBOX"
LOOK_S: Final = 1.0
PATIENCE_S: Final = 10.0  # for a primary to answer
FOLDER_QUIET_S: Final = 60.0  # an empty folder is removed after this: whoever copies a tree makes its folders first
AT_ONCE: Final = 200
LITTER: Final = frozenset({"desktop.ini", "thumbs.db", ".ds_store"})  # left behind by Windows and macOS
WORKERS: Final = 2
ZIP: Final = b"PK\x03\x04"
NAME_BYTES_MAX: Final = 228
SAID: Final = ".txt"
FIRST_DELAY_S, DELAY_MAX_S = 2.0, 60.0  # of what can't be taken now
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
        self._later: dict[Path, tuple[float, float]] = {}  # not before when, and after how long
        self.stored = self.rejected = 0

    def turn(self) -> int:
        """Take what is at rest; returns how many files were stored or rejected. Raises OSError or Unreachable."""
        self._taken.mkdir(exist_ok=True)
        before = self.stored + self.rejected
        self._seen_now = set()
        files_aside, folders_aside = self._below(self._taken)
        files, folders = self._below(self._folder)
        left_over = [path for path in files_aside if self._is_at_rest(path)]
        found = [path for path in files if self._is_at_rest(path)]
        remove_if_empty(folders_aside)
        remove_if_empty(path for path in folders if self._is_at_rest(path))
        self._seen = {path: seen for path, seen in self._seen.items() if path in self._seen_now}
        self._later = {path: when for path, when in self._later.items() if path in self._seen_now}
        self._settle([(path, Path(*path.relative_to(self._taken).parts[1:])) for path in left_over[:AT_ONCE]])
        self._settle([aside for path in found[:AT_ONCE] if (aside := self._set_aside(path)) is not None])
        return self.stored + self.rejected - before

    # -- what is to be taken -----------------------------------------------------------------------------------

    def _below(self, top: Path) -> tuple[list[Path], list[Path]]:
        """All files there, and all folders, those in them first."""
        left, files, folders = [top], list[Path](), list[Path]()
        while left:
            folder = left.pop()
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                if folder == self._folder and entry.name in (REJECTED, TAKEN, RECYCLED):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    left.append(Path(entry.path))
                    folders.append(left[-1])
                else:
                    files.append(Path(entry.path))
        return files, folders[::-1]

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
        return is_quiet and self._later.get(path, (now, 0.0))[0] <= now

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
        """Raises Unreachable. What is wrong with one of them holds up no other."""
        plain: list[tuple[Path, Path]] = []
        for path, name in files:
            with self._by_itself(path, name):
                kind = kind_of(path)
                if kind == "zip":
                    self._settle_zip(path, name)
                elif kind == "litter":
                    path.unlink()
                elif kind != "file":
                    self._reject(path, name, f"It is {kind}, and no file.")
                elif path.lstat().st_size > self._largest_bytes:
                    self._reject(path, name, self._too_long)
                else:
                    plain.append((path, name))
        for path, name, outcome in self._stored(plain):
            with self._by_itself(path, name):
                if outcome.later:
                    self._postpone(path, name, outcome.why)
                elif outcome.why:
                    self._reject(path, name, outcome.why)
                else:
                    path.unlink()
                    self._note(outcome, name)

    @contextlib.contextmanager
    def _by_itself(self, path: Path, name: Path) -> Iterator[None]:
        try:
            yield
        except Unreachable:
            raise
        except Exception as error:  # whatever it is, it is about this file
            self._postpone(path, name, f"{type(error).__name__}: {error}")

    def _postpone(self, path: Path, name: Path, why: str) -> None:
        _, delay_s = self._later.get(path, (0.0, FIRST_DELAY_S / 2))
        delay_s = min(2 * delay_s, DELAY_MAX_S)
        self._later[path] = (time.monotonic() + delay_s, delay_s)
        log.warning("inbox.later", file=str(name), why=why, seconds=delay_s)

    @property
    def _too_long(self) -> str:
        return f"It is longer than {self._largest_bytes} bytes (max_object_bytes)."

    def _note(self, outcome: Outcome, name: Path) -> None:
        if not outcome.dropped:
            self.stored += 1
            log.info("inbox.stored", file=str(name))

    def _stored(self, files: list[tuple[Path, Path]]) -> Iterator[tuple[Path, Path, Outcome]]:
        """Raises Unreachable."""
        try:
            outcomes = self._store([path for path, _ in files])
        except Unreachable:
            raise
        except Exception as error:
            if len(files) == 1:
                outcomes = [Outcome(f"{type(error).__name__}: {error}", later=True)]
            else:  # which one it was
                for one in files:
                    yield from self._stored([one])
                return
        for (path, name), outcome in zip(files, outcomes, strict=True):
            yield path, name, outcome

    def _store(self, paths: list[Path]) -> list[Outcome]:
        """Raises Unreachable, or whatever went wrong."""
        known = {path: outcome for path in paths if (outcome := looked_at(path)) is not None}
        whole, notes = [path for path in paths if path not in known], Gathered()
        if whole:
            bring_in(whole, self._target, notes, min(WORKERS, len(whole)), lambda: None)
        fates = {fate.key[0]: fate for fate in notes.fates}
        return [known.get(path) or outcome_of(fates.get(str(path.resolve())) or fates.get(str(path))) for path in paths]

    # -- what is rejected --------------------------------------------------------------------------------------

    def _reject(self, path: Path, name: Path, why: str) -> None:
        to = self._place(self._folder_for(name.parts[:-1]), name.name)
        os.rename(path, to)
        self._explain(to, name, why)

    def _explain(self, to: Path, name: Path, why: str) -> None:
        said = f"{name}\n\nThis wasn't taken into the archive. {why}\n\nIt is kept here until somebody deletes it.\n"
        beside = to.with_name(f".why-{os.getpid()}")
        beside.write_bytes(said.replace("\n", "\r\n").encode("utf-8", "replace"))  # for Windows' Notepad, too
        os.rename(beside, saying(to))
        self.rejected += 1
        log.warning("inbox.rejected", file=str(name), why=why)

    def _folder_for(self, parts: tuple[str, ...]) -> Path:
        """Below `rejected`; where a file has the name of one, it is another."""
        folder = self._folder / REJECTED
        for part in parts:
            folder = next(one for one in others(folder, part) if not one.exists() or one.is_dir())
            folder.mkdir(exist_ok=True)
        return folder

    def _place(self, folder: Path, name: str) -> Path:
        """A free one, for a file and what is said of it."""
        return next(one for one in others(folder, name) if is_free(one) and is_free(saying(one)))

    # -- ZIP files ---------------------------------------------------------------------------------------------

    def _settle_zip(self, path: Path, name: Path) -> None:
        """Each file in it, as if it had been put here by itself, in a folder of the ZIP's name."""
        bad: list[tuple[zipfile.ZipInfo, str]] = []
        try:
            with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(prefix="tandem-inbox-") as scratch:
                for member in archive.infolist():
                    outcome = self._settle_member(archive, member, name, Path(scratch) / "file")
                    if outcome.later:  # all of it is tried again: what is stored is stored once
                        self._postpone(path, name, outcome.why)
                        return
                    if outcome.why:
                        bad.append((member, outcome.why))
                if bad:
                    self._reject_members(archive, bad, name)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
            self._reject(path, name, f"It is a ZIP file that can't be read: {error}.")
            return
        if any(not self._can_unpack(member) for member, _ in bad):
            self._reject(path, name, "Some of what is in it can't be unpacked; a folder of its name says what.")
        else:
            path.unlink()

    def _can_unpack(self, member: zipfile.ZipInfo) -> bool:
        return not member.flag_bits & 1 and member.file_size <= self._largest_bytes

    def _settle_member(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: Path, extracted: Path) -> Outcome:
        if member.is_dir():
            return DIRECTORY
        if member.flag_bits & 1:
            return Outcome("It is encrypted: put it here without a password.")
        if member.file_size > self._largest_bytes:
            return Outcome(self._too_long)
        unpack(archive, member, extracted)
        kind = kind_of(extracted, Path(member.filename).name)
        if kind == "litter":
            return DIRECTORY
        if kind == "zip":
            return Outcome("It is a ZIP file in a ZIP file.")
        outcome = self._store([extracted])[0]
        if not (outcome.why or outcome.later):
            self._note(outcome, name / safe(member.filename))
        return outcome

    def _reject_members(self, archive: zipfile.ZipFile, bad: list[tuple[zipfile.ZipInfo, str]], name: Path) -> None:
        above = self._folder_for(name.parts[:-1])
        top = next(one for one in others(above, name.name) if is_free(one))  # not one of another ZIP of this name
        for member, why in bad:
            inside = safe(member.filename)
            below = (*top.relative_to(self._folder / REJECTED).parts, *inside.parts[:-1])
            to = self._place(self._folder_for(below), inside.name)
            if self._can_unpack(member):
                unpack(archive, member, to)
            self._explain(to, name / inside, why)


def remove_if_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # it isn't empty
            folder.rmdir()


class Gathered(Nowhere):
    """What became of each file."""

    def __init__(self) -> None:
        super().__init__()
        self.fates: list[Fate] = []

    def note(self, fate: Fate) -> None:
        self.fates.append(fate)


def outcome_of(fate: Fate | None) -> Outcome:
    """Only what somebody has said is stored is."""
    if fate is None:
        return Outcome("nothing is known of it", later=True)
    if fate.later:
        return Outcome(fate.why, later=True)
    return Outcome(f"{fate.why[:1].upper()}{fate.why[1:]}." if fate.why else "")


def unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, to: Path) -> None:
    with archive.open(member) as source, to.open("wb") as target:
        while step := source.read(STEP_BYTES):  # not more than it says, whatever it says
            target.write(step)


def others(folder: Path, name: str) -> Iterator[Path]:
    """A name in a folder, and with numbers; short enough for `.txt` behind it."""
    stem, suffix = Path(name).stem, Path(name).suffix
    yield folder / fitting(stem, suffix)
    for number in itertools.count(2):
        yield folder / fitting(stem, f" ({number}){suffix}")


def saying(place: Path) -> Path:
    """Where it is said why something is there."""
    return place.with_name(f"{place.name}{SAID}")


def is_free(path: Path) -> bool:
    return not os.path.lexists(path)


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
        return CUT if has_unwritten_end(path) or is_cut_short(path) else None
    except MediaDirectory:
        return DIRECTORY  # the images that it names are taken by themselves
    except (NotAnInstance, OSError):
        return None  # why it can't be stored is found out when it is to be


def has_unwritten_end(path: Path) -> bool:
    """The last of it is a hole: somebody said how long it was to be, and was cut off before it was written."""
    try:
        return os.getxattr(path, UNWRITTEN) != b"0"
    except OSError:
        pass
    with path.open("rb") as file:  # not on the share
        try:
            return ends_in_hole(file.fileno())
        except OSError:
            return False


def is_open(path: Path) -> bool:
    """Somebody has it open, as far as its file system says."""
    try:
        return os.getxattr(path, OPEN, follow_symlinks=False) != b"0"
    except OSError:
        return False


def fitting(stem: str, end: str) -> str:
    """A name with an end, cut so that with `.txt` behind it it can be read over SMB: 228 bytes."""
    end = end if len(os.fsencode(end)) < NAME_BYTES_MAX // 2 else ""
    room = NAME_BYTES_MAX - len(SAID) - len(os.fsencode(end))
    whole = os.fsencode(stem)
    return (stem if len(whole) <= room else whole[:room].decode("utf-8", "ignore")) + end


def safe(name: str) -> Path:
    """A member's name as a path that leads nowhere else."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", "..", ".")]
    return Path(*[fitting(part.replace("\0", "_"), "") for part in parts] or ["_"])


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
