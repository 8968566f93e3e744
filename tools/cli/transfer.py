"""`tandem import|export|hash-password`: whole folders in, whole studies out."""

import getpass
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from tools.cli import progress
from tools.cli.exits import EXIT_AWAY, EXIT_CONFIG, EXIT_FAILED, EXIT_FOUND
from tools.cli.importing import Fate, Journal, Target, Unreachable, bring_in, files_below
from tools.cli.operate import fetch, ordered
from tools.cli.options import Failure, config_option, dicom_host, json_option, login, settings_of
from tools.cli.say import say

SHOWN = 20
APART = "NOT_IN_DICOMDIR"


@click.command("import")
@config_option
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--to", metavar="HOST:PORT", help="Instead of the node of the settings.")
@click.option("--aet", default="TANDEM", show_default=True, help="AE title called, with --to.")
@click.option("--workers", default=4, show_default=True, type=click.IntRange(1, 32), help="Associations at once.")
@click.option(
    "--journal",
    default=Path("tandem-import.jsonl"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="What became of each file; run again with it, and only what isn't stored is tried.",
)
@json_option
def import_(
    config: Path | None, paths: tuple[Path, ...], to: str | None, aet: str, workers: int, journal: Path, as_json: bool
) -> None:
    """Store DICOM files and folders of them, byte for byte. Exit 4 if some were refused.

    Where users are asked for, TANDEM_USER and TANDEM_PASSWORD say as whom.
    """
    target = _target(config, to, aet)
    warnings.simplefilter("ignore")  # pydicom's, about values; what can't be stored is told file by file
    found = list(files_below(paths))
    notes = Journal(journal)
    try:
        with progress.counting("import", len(found)) as done:
            counts, refused = bring_in(found, target, notes, workers, lambda: done(1))
    except Unreachable as error:
        raise Failure(f"{error}; run it again to go on", EXIT_AWAY) from None
    finally:
        notes.close()
    result = {
        "files": len(found),
        **{key: counts[key] for key in ("stored", "known", "refused")},
        "journal": str(journal),
    }
    say(result, as_json, lambda: _report(result, refused))
    sys.exit(EXIT_FOUND if refused else 0)


def _target(config: Path | None, to: str | None, aet: str) -> Target:
    if to:
        host, _, port = to.rpartition(":")
        if not host or not port.isdecimal():
            raise Failure(f"--to {to}: HOST:PORT is expected", EXIT_CONFIG)
        return Target(host, int(port), aet, login())
    settings = settings_of(config)
    return Target(dicom_host(settings), settings.dicom.port, settings.dicom.aet, login())


def _report(result: dict[str, Any], refused: list[Fate]) -> str:
    lines = [
        f"{result['files']} files: {result['stored']} stored, {result['known']} were stored before, "
        f"{result['refused']} refused"
    ]
    lines += [f"  {fate.key[0]}: {fate.why}" for fate in refused[:SHOWN]]
    if len(refused) > SHOWN:
        lines.append(f"  and {len(refused) - SHOWN} more in {result['journal']}")
    return "\n".join(lines)


@click.command()
@config_option
@click.option("--study", "studies", multiple=True, required=True, help="Study Instance UID; several are possible.")
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def export(config: Path | None, studies: tuple[str, ...], folder: Path, as_json: bool) -> None:
    """Write studies to FOLDER as a DICOM file-set, with DICOMDIR: each copy checked against its digest."""
    warnings.simplefilter("ignore")  # pydicom's, about values
    if folder.exists() and any(folder.iterdir()):
        raise Failure(f"{folder} isn't empty; give a new folder", EXIT_CONFIG)
    uids = [uid for study in studies for uid in ordered(config, "instances", study=study)["instances"]]
    if not uids:
        raise Failure("nothing is stored of these studies here", EXIT_FAILED)
    folder.mkdir(parents=True, exist_ok=True)
    staged = (folder / ".export").resolve()
    staged.mkdir()
    try:
        with progress.counting("export", len(uids)) as done:
            for number, uid in enumerate(uids):
                fetch(config, uid, staged / f"{number:08d}")
                done(1)
        apart = file_set(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    result = {"instances": len(uids), "not_in_dicomdir": apart, "folder": str(folder)}
    text = [f"{len(uids)} instances in {folder}"]
    if apart:
        text.append(f"{len(apart)} lack what a DICOMDIR needs and are in {folder / APART}:")
        text += [f"  {uid}: {why}" for uid, why in list(apart.items())[:SHOWN]]
    say(result, as_json, "\n".join(text))


def file_set(staged: Path, folder: Path) -> dict[str, str]:
    """Make the files of `staged` a file-set with DICOMDIR (PS3.10 8). What can't be part of one lies in a folder of its
    own; returns SOP Instance UID -> why."""
    from pydicom import dcmread
    from pydicom.fileset import FileSet

    files, apart = FileSet(), {}
    for path in sorted(staged.iterdir()):
        try:
            files.add(path)
        except Exception as error:  # pydicom's records ask for attributes that not every image has
            uid = str(dcmread(path, specific_tags=["SOPInstanceUID"], stop_before_pixels=True).SOPInstanceUID)
            (folder / APART).mkdir(exist_ok=True)
            path.rename(folder / APART / f"{uid}.dcm")
            apart[uid] = str(error)
    files.write(folder)
    return apart


@click.command("hash-password")
def hash_password() -> None:
    """Ask for a password and print what stands for it under [dicom] users."""
    from gateway.archive.users import hash_password as hashed

    given = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    if not given:
        raise Failure("no password was given", EXIT_CONFIG)
    click.echo(hashed(given.encode(), os.urandom(16)))


COMMANDS: tuple[click.Command, ...] = (import_, export, hash_password)
