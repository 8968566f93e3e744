"""`tandem volume|scrub|verify|delete|get|quarantine`: what an operator has done on a running node."""

import getpass
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import click
import xxhash

from conf.settings import Settings
from storage.control_client import OrderFailed, order
from storage.objects.blob_store import READ_BYTES
from storage.objects.local_volume import create_marker
from storage.objects.volume import MARKER
from tools.cli import progress
from tools.cli.exits import EXIT_AWAY, EXIT_FAILED, EXIT_FOUND
from tools.cli.options import (
    Failure,
    config_option,
    give_to_gateway,
    json_option,
    owner_differs,
    settings_of,
    sure,
    yes_option,
)
from tools.cli.quarantine import RestoreFailed, restore
from tools.cli.say import say
from tools.cli.status import printable, size

FETCH_ATTEMPTS = 3

path_argument = click.argument("path", type=click.Path(path_type=Path))


def ordered(config: Path | None, order_name: str, /, label: str = "", **given: Any) -> dict[str, Any]:
    """Have the node carry out an order, with a progress bar if `label` is given."""
    settings = settings_of(config)
    try:
        if not label:
            return order(settings.control_socket, order_name, given)
        with progress.of(label) as moved:
            return order(settings.control_socket, order_name, given, moved)
    except OrderFailed as error:
        raise Failure(str(error), EXIT_FAILED) from None
    except OSError as error:
        raise Failure(f"the gateway of node {settings.node.name} isn't running ({error.strerror})", EXIT_AWAY) from None


@click.group()
def volume() -> None:
    """Volumes: the folders, one on each disk, that hold the objects."""


@volume.command("add")
@config_option
@path_argument
@json_option
def volume_add(config: Path | None, path: Path, as_json: bool) -> None:
    """Make PATH a volume, and take it into service if the node runs. Also for a new disk in the place of a dead one."""
    path = path.resolve()
    settings = settings_of(config) if config else None
    if settings:
        try:
            _prepare(settings, path)
            made = order(settings.control_socket, "volume-add", {"path": str(path)})
            result = {"path": str(path), "id": made["id"], "in_service": True}
            say(result, as_json, f"{path}: volume {made['id']}, in service{_unlisted(settings, path)}")
            return
        except OrderFailed as error:
            raise Failure(str(error), EXIT_FAILED) from None
        except OSError:
            pass  # not running: it finds the volume at its start
    try:
        if settings:
            _prepare(settings, path)
        volume_id = create_marker(path)
        if settings:
            give_to_gateway(settings, path / MARKER)
        result = {"path": str(path), "id": volume_id, "in_service": False}
        say(result, as_json, f"{path}: volume {volume_id}{_unlisted(settings, path)}")
    except OSError as error:
        raise Failure(f"{path}: {error.strerror or error}", EXIT_FAILED) from error


def _prepare(settings: Settings, path: Path) -> None:
    """Leave a file system that was just made to the gateway's user. Raises Failure for one on the system's disk."""
    if os.geteuid() != 0 or not path.is_dir() or not owner_differs(settings, path):
        return
    if not path.is_mount():
        hint = "mount the disk first, or give the folder to the gateway's user"
        raise Failure(f"{path} isn't a mount point and isn't the gateway's; {hint}", EXIT_FAILED)
    if any(entry.name not in ("lost+found", MARKER) for entry in path.iterdir()):
        hint = "chown it if it is meant to be a volume"
        raise Failure(f"{path} isn't empty and isn't the gateway's; {hint}", EXIT_FAILED)
    give_to_gateway(settings, path)


def _unlisted(settings: Settings | None, path: Path) -> str:
    listed = settings is not None and path in settings.storage.volumes
    return "" if listed else "; list it under [storage] volumes"


@volume.command("list")
@config_option
@json_option
def volume_list(config: Path | None, as_json: bool) -> None:
    """Show the volumes of this node."""
    result = ordered(config, "volume-list")

    def text() -> str:
        return "\n".join(
            f"{row['path']}: {row['state']}, {row['copies']} copies"
            + (f", {size(row['free'])} free of {size(row['total'])}" if "free" in row else "")
            for row in result["volumes"]
        )

    say(result, as_json, text)


@volume.command("drain")
@config_option
@path_argument
@json_option
def volume_drain(config: Path | None, path: Path, as_json: bool) -> None:
    """Move all that lies on PATH to the other volumes; nothing new goes there any more."""
    result = ordered(config, "volume-drain", f"emptying {path}", path=str(path.resolve()))

    def text() -> str:
        said = f"{path}: {result['moved']} copies moved, {result['left']} left"
        if result["files_moved"] or result["files_left"]:
            said += f"; {result['files_moved']} files of the share moved, {result['files_left']} left"
        return f"{said}: {result['why']}" if result["why"] else said

    say(result, as_json, text)
    if result["left"] or result["files_left"]:
        sys.exit(EXIT_FAILED)


@volume.command("retire")
@config_option
@path_argument
@json_option
def volume_retire(config: Path | None, path: Path, as_json: bool) -> None:
    """Take an empty volume out of service. Remove it from [storage] volumes too."""
    result = ordered(config, "volume-retire", path=str(path.resolve()))
    say(result, as_json, f"{path}: retired; remove it from [storage] volumes in the settings")


@click.command()
@config_option
@click.option("--now", is_flag=True, help="Check at once; without it only the node's own round is shown.")
@click.option("--study", default="", help="Only this Study Instance UID.")
@json_option
def scrub(config: Path | None, now: bool, study: str, as_json: bool) -> None:
    """Read this node's copies and check them against their digests; what is bad is made again from the other node."""
    if not now and not study:
        found = ordered(config, "scrub-status")
        say(found, as_json, lambda: f"{found['checked']} copies checked since the start, {found['bad']} bad or gone")
        return
    result = ordered(config, "scrub", "checking", study=study)
    say(
        result,
        as_json,
        lambda: (
            f"{result['checked']} copies checked, {result['bad']} bad or gone, "
            f"{result['strangers']} files set aside that the catalogue doesn't name"
        ),
    )


@click.command()
@config_option
@click.option("--quick", is_flag=True, help="Don't read the copies, only look whether they are there.")
@json_option
def verify(config: Path | None, quick: bool, as_json: bool) -> None:
    """Compare the two nodes' catalogues and copies and print the differences. Exit 4 if there are any."""
    result = ordered(config, "verify", "comparing", read=not quick)

    def text() -> str:
        verdict = "the same" if result["same"] else f"{result['count']} differences"
        return "\n".join([*result["differences"], f"{result['entries']} entries compared: {verdict}"])

    say(result, as_json, text)
    if not result["same"]:
        sys.exit(EXIT_FOUND)


@click.command()
@config_option
@click.option("--study", required=True, help="Study Instance UID.")
@click.option("--series", default="", help="Only this Series Instance UID.")
@click.option("--instance", default="", help="Only this SOP Instance UID.")
@click.option("--reason", required=True, help="Why; goes to the audit log and the quarantine.")
@yes_option
@json_option
def delete(config: Path | None, study: str, series: str, instance: str, reason: str, yes: bool, as_json: bool) -> None:
    """Delete a study, series or instance on both nodes. The files stay in quarantine until they are purged."""
    what = f"instance {instance}" if instance else f"series {series}" if series else f"study {study}"
    sure(f"Delete {what} on both nodes?", yes)
    given = {"study": study, "series": series, "sop_instance": instance, "reason": reason, "by": getpass.getuser()}
    result = ordered(config, "delete", **given)
    say(result, as_json, lambda: f"{result['deleted']} instances deleted")


@click.command()
@config_option
@click.argument("sop_instance", metavar="SOP_INSTANCE_UID")
@click.option("--output", type=click.Path(path_type=Path), help="File to write; default: UID.dcm here.")
@json_option
def get(config: Path | None, sop_instance: str, output: Path | None, as_json: bool) -> None:
    """Write an object's file, from this node's copy or the other's, checked against its digest."""
    target = (output or Path(f"{sop_instance}.dcm")).resolve()
    source = fetch(config, sop_instance, target)
    result = {"sop_instance": sop_instance, "from": source, "output": str(target)}
    say(result, as_json, lambda: f"{target} (from {source})")


def fetch(config: Path | None, sop_instance: str, target: Path) -> str:
    """Write an object's file; says whose copy it is."""
    for _attempt in range(FETCH_ATTEMPTS):
        result = ordered(config, "get", sop_instance=sop_instance)
        try:
            with open(result["file"], "rb") as file:
                good = _copied(file, target, result["offset"]) == result["digest"]
        except FileNotFoundError:
            continue  # moved to another disk, or replaced, since we were told where it is
        except OSError as error:
            raise Failure(f"{error.filename or target}: {error.strerror}", EXIT_FAILED) from error
        if good:
            return str(result["from"])
        target.unlink()
    raise Failure(f"{sop_instance} changes all the time; try again later", EXIT_FAILED)


def _copied(file: BinaryIO, target: Path, offset: int) -> str:
    """Digest of what was copied from `offset` on. Raises OSError."""
    digest = xxhash.xxh3_128()
    try:
        output = target.open("wb")
    except FileNotFoundError as error:
        raise Failure(f"{target}: {error.strerror}", EXIT_FAILED) from error
    with output:
        output.write(file.read(offset))
        while block := file.read(READ_BYTES):
            digest.update(block)
            output.write(block)
    return digest.hexdigest()


@click.command()
@config_option
@json_option
def conflicts(config: Path | None, as_json: bool) -> None:
    """Studies whose instances name more than one patient, and how many instances name which. Exit 4 if there are any.

    Each is found under every patient it names, and never sent as somebody else's. Delete what is wrong, or have the
    modality send it again.
    """
    result = ordered(config, "conflicts")

    def text() -> str:
        lines = []
        for one in result["studies"]:
            lines.append(one["study"])
            for row in one["patients"]:
                issuer = f" ({row['issuer']})" if row["issuer"] else ""
                lines.append(
                    f"    {printable(row['patient_id']) or 'no ID'}{printable(issuer)}: {row['instances']} instances"
                )
        if result["count"] > len(result["studies"]):
            lines.append(f"... {result['count']} in all")
        return "\n".join(lines) or "no study names more than one patient"

    say(result, as_json, text)
    if result["count"]:
        sys.exit(EXIT_FOUND)


@click.group()
def quarantine() -> None:
    """What was refused, replaced, deleted or found damaged."""


@quarantine.command("list")
@config_option
@json_option
def quarantine_list(config: Path | None, as_json: bool) -> None:
    """Show the quarantined objects of this node with their reasons."""
    result = ordered(config, "quarantine-list")
    say(
        result,
        as_json,
        lambda: (
            "\n".join(
                printable(f"{one['id']}  {size(one['bytes'])}  {one.get('sop_instance', '')}  {one['reason']}")
                + f"\n    {printable(one['file'])}"
                for one in result["objects"]
            )
            or "the quarantine is empty"
        ),
    )


@quarantine.command("restore")
@config_option
@click.argument("ids", nargs=-1, required=True)
@json_option
def quarantine_restore(config: Path | None, ids: tuple[str, ...], as_json: bool) -> None:
    """Store quarantined objects again, as if they were sent anew; they leave the quarantine when that succeeded."""
    settings = settings_of(config)
    known = {one["id"]: Path(one["file"]) for one in ordered(config, "quarantine-list")["objects"]}
    for one in ids:
        if one not in known:
            raise Failure(f"{one} isn't in the quarantine of this node", EXIT_FAILED)
        try:
            restore(known[one], settings)
        except RestoreFailed as error:
            raise Failure(f"{one}: {error}", EXIT_FAILED) from error
        ordered(config, "quarantine-purge", older_than_days=0, ids=[one])
        say({"restored": one}, as_json, f"{one}: stored")


@quarantine.command("purge")
@config_option
@click.option("--older-than", "days", type=float, required=True, help="Days; 0 for all.")
@yes_option
@json_option
def quarantine_purge(config: Path | None, days: float, yes: bool, as_json: bool) -> None:
    """Delete quarantined objects for good."""
    sure("Delete these objects for good?", yes)
    result = ordered(config, "quarantine-purge", older_than_days=days)
    say(result, as_json, lambda: f"{result['purged']} objects purged")


COMMANDS: tuple[click.Command, ...] = (volume, scrub, verify, delete, get, conflicts, quarantine)
