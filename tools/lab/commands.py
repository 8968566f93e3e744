"""`tandem lab ...`: the command line of the lab."""

import json
import os
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec

import click

from storage.control_client import OrderFailed
from storage.crash import POINTS
from tools.cli.status import render
from tools.lab.disks import DiskError
from tools.lab.network import MEMBERS, LabError
from tools.lab.pair import VOLUMES_MAX, Lab, find_lab

P = ParamSpec("P")

_LAB: list[click.Command] = []

dir_option = click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="Folder of the lab; default: the one brought up last."
)
volume_argument = click.argument("number", metavar="VOLUME", type=click.IntRange(1, VOLUMES_MAX))
node_argument = click.argument("node", type=click.Choice(MEMBERS))
from_argument = click.argument(
    "other", metavar="FROM", type=click.Choice(["a", "b", "w", "client", "all", "service", "private"])
)


def _command(name: str) -> Callable[[Callable[Concatenate[Lab, P], None]], click.Command]:
    """A lab command: finds the lab, and turns what goes wrong into one line."""

    def decorate(function: Callable[Concatenate[Lab, P], None]) -> click.Command:
        @wraps(function)
        def run(folder: Path | None, *args: P.args, **kwargs: P.kwargs) -> None:
            try:
                function(find_lab(folder), *args, **kwargs)
            except (LabError, DiskError, OrderFailed, OSError) as error:
                raise click.ClickException(str(error)) from None

        made: click.Command = click.command(name)(dir_option(run))
        _LAB.append(made)
        return made

    return decorate


@click.command("up")
@click.option("--dir", "folder", type=click.Path(path_type=Path), required=True, help="Folder for everything.")
@click.option("--ttl", default=3.0, show_default=True, help="Seconds until a lost node is noticed.")
@click.option(
    "--volumes", default=1, show_default=True, type=click.IntRange(1, VOLUMES_MAX), help="Volumes of each node."
)
@click.option("--tls/--no-tls", default=True, show_default=True, help="Between the nodes and to etcd.")
@click.option("--disk-size", default=0, help="MB of each volume: a file system of its own, that can fail; 0: folders.")
def up(folder: Path, ttl: float, volumes: int, tls: bool, disk_size: int) -> None:
    """Bring the pair up and wait until it is in sync. The last line is a JSON object that describes it."""
    lab = Lab(folder.resolve())
    try:
        click.echo("starting two nodes and a witness ...", err=True)
        described = lab.up(ttl, volumes, disk_size, tls=tls)
    except (LabError, DiskError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(described))


_LAB.append(up)


@_command("down")
@click.option("--keep-data", is_flag=True, help="Leave the nodes' folders, for a later `up` with the same --dir.")
def down(lab: Lab, keep_data: bool) -> None:
    """End the lab: processes, namespaces and folders."""
    lab.down(keep_data=keep_data)


@_command("status")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(lab: Lab, as_json: bool) -> None:
    """Both nodes' status."""
    found = lab.status()
    if as_json:
        click.echo(json.dumps(found))
        return
    for node, state in found["nodes"].items():
        click.echo(render(state) if state else f"node {node}: off, or its gateway isn't running")
        click.echo("")


@click.command("exec", context_settings={"ignore_unknown_options": True})
@dir_option
@click.argument("member", metavar="NODE|client", type=click.Choice([*MEMBERS, "client"]))
@click.argument("words", metavar="CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(folder: Path | None, member: str, words: tuple[str, ...]) -> None:
    """Run a command on a node or on the client. On a node, TANDEM_CONFIG names its settings."""
    try:
        argv, environment = find_lab(folder).command(member, list(words))
    except LabError as error:
        raise click.ClickException(str(error)) from None
    if shutil.which(argv[0]) is None:
        raise click.ClickException("`ip` is missing; tools/setup installs what is needed")
    os.execvpe(argv[0], argv, environment)


_LAB.append(execute)


@_command("power-off")
@node_argument
def power_off(lab: Lab, node: str) -> None:
    """Pull a node's power: the cable out, then everything in it killed."""
    lab.power_off(node)


@_command("power-on")
@node_argument
def power_on(lab: Lab, node: str) -> None:
    """Switch a node on again."""
    lab.power_on(node)


@_command("kill")
@node_argument
@click.argument("process", type=click.Choice(["gateway", "ha", "etcd", "smbd", "mount", "inbox"]))
def kill(lab: Lab, node: str, process: str) -> None:
    """kill -9 of one process; it is started again, as systemd would."""
    lab.kill(node, process)


@_command("disk-fail")
@node_argument
@volume_argument
def disk_fail(lab: Lab, node: str, number: int) -> None:
    """Let a disk die: every operation on it is an I/O error from now on, and what wasn't synced is gone."""
    lab.disks(node).fail(number)


@_command("disk-full")
@node_argument
@volume_argument
@click.option("--undo", is_flag=True, help="Give the room back.")
def disk_full(lab: Lab, node: str, number: int, undo: bool) -> None:
    """Leave no room on a disk."""
    if undo:
        lab.disks(node).empty(number)
    else:
        lab.disks(node).fill(number)


@_command("disk-slow")
@node_argument
@volume_argument
@click.option("--seconds", default=10.0, show_default=True, help="How long.")
def disk_slow(lab: Lab, node: str, number: int, seconds: float) -> None:
    """Let every write to a disk hang for a while."""
    lab.disks(node).stall(number, seconds)


@_command("replace-disk")
@node_argument
@volume_argument
def replace_disk(lab: Lab, node: str, number: int) -> None:
    """Put an empty disk in the place of one, and take it into service."""
    lab.replace_disk(node, number)


@_command("bitflip")
@node_argument
@click.argument("sop_instance", metavar="SOP_INSTANCE_UID")
def bitflip(lab: Lab, node: str, sop_instance: str) -> None:
    """Change one byte of an object on a node, behind its back."""
    click.echo(lab.disks(node).flip_bit(sop_instance))


@_command("crash")
@node_argument
@click.argument("point", type=click.Choice(POINTS))
@click.option("--count", default=1, show_default=True, help="At which time it is passed.")
def crash(lab: Lab, node: str, point: str, count: int) -> None:
    """Let a node's gateway kill itself when it passes a named point."""
    lab.order(node, "crash", point=point, count=count)


@_command("freeze")
@node_argument
def freeze(lab: Lab, node: str) -> None:
    """Stop all processes of a node, as if it hung."""
    lab.freeze(node)


@_command("thaw")
@node_argument
def thaw(lab: Lab, node: str) -> None:
    """Let a frozen node go on."""
    lab.thaw(node)


@_command("cut")
@node_argument
@from_argument
@click.option("--one-way", type=click.Choice(["in", "out"]), help="Only what comes in, or only what goes out.")
def cut(lab: Lab, node: str, other: str, one_way: str | None) -> None:
    """Cut NODE off FROM another member or from all, or take its cable out of the service or the private network."""
    lab.cut(node, other, inward=one_way != "out", outward=one_way != "in")


@_command("join")
@node_argument
@from_argument
def join(lab: Lab, node: str, other: str) -> None:
    """Mend what `cut` cut."""
    lab.join(node, other)


@_command("slow")
@node_argument
@click.argument("mbit", type=click.IntRange(0))
def slow(lab: Lab, node: str, mbit: int) -> None:
    """Let no more than MBIT megabits a second reach NODE on each of its cables; 0: as fast as it goes."""
    lab.slow(node, mbit)


lab = click.Group(
    "lab",
    commands=_LAB,
    help="A pair on this one machine, in network namespaces: for trying, demonstrating and testing. Needs root.",
)
COMMANDS: tuple[click.Command, ...] = (lab,)
