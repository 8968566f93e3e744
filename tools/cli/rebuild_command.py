"""`tandem rebuild-index`: its command line."""

from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import click

from storage.log.folder import LogDamaged
from storage.objects.locks import lock_state
from storage.objects.volume import VolumeOffline
from storage.state.kv import CatalogueDamaged
from tools.cli.exits import EXIT_CONFIG, EXIT_FAILED
from tools.cli.options import Failure, config_option, give_to_gateway, json_option, settings_of, sure, yes_option
from tools.cli.progress import counting
from tools.cli.say import say
from tools.rebuild.making import Rebuilt, from_files, open_volumes, set_aside


@click.command("rebuild-index")
@config_option
@click.option("--from", "source", type=click.Choice(["files", "peer"]), help="Default: peer in a pair, files alone.")
@click.option("--disaster", is_flag=True, help="From files although the node is one of a pair: the other one is gone.")
@click.option("--jobs", default=2, show_default=True, help="Processes that read files.")
@yes_option
@json_option
def rebuild_index(config: Path | None, source: str | None, disaster: bool, jobs: int, yes: bool, as_json: bool) -> None:
    """Make a node's catalogue anew, while its gateway doesn't run.

    The old one is set aside when the new one is complete.

    `peer`: the node begins anew as a stranger, follows the other node and takes over the files that lie here; the way
    to go whenever the other node is well. `files`: from the files of its own volumes, into a new log. In a pair that is
    for the day when the other node is gone for good (`--disaster`): afterwards `tandem failover --force` on this node.
    """
    settings = settings_of(config)
    source = source or ("peer" if settings.cluster else "files")
    if source == "peer" and settings.cluster is None:
        raise Failure("this node has no peer", EXIT_CONFIG)
    if source == "files" and settings.cluster is not None and not disaster:
        raise Failure(
            "this node is one of a pair: `--from peer` has it follow the other one; `--from files --disaster` is for "
            "when that one is gone for good, and what only it held is lost then",
            EXIT_CONFIG,
        )
    try:
        lock = lock_state(settings.storage.state)
        give_to_gateway(settings, lock.path)
        volumes = open_volumes(settings) if source == "files" else []
    except VolumeOffline as error:
        raise Failure(f"{error}; mount it first, or take it out of [storage] volumes", EXIT_FAILED) from error
    except OSError as error:
        raise Failure(f"{error.strerror or error}; stop the gateway first", EXIT_FAILED) from error
    if disaster:  # the rest can be undone: the old catalogue is only set aside
        sure("Make the catalogue of this node anew, into a log of its own?", yes)
    if source == "peer":
        aside = set_aside(settings)
        say(
            {"from": "peer", "aside": str(aside or "")}, as_json, lambda: "the node begins anew when its gateway starts"
        )
    else:
        try:
            with counting("reading files") as progress:
                rebuilt, aside = from_files(settings, volumes, progress, jobs)
        except (OSError, CatalogueDamaged, LogDamaged, BrokenProcessPool) as error:
            raise Failure(f"can't rebuild: {error}; the old catalogue is where it was", EXIT_FAILED) from error
        finally:
            for volume in volumes:
                volume.close()
        _report(rebuilt, aside, as_json, disaster)
    if aside:
        click.echo(f"the old catalogue is in {aside}", err=True)
    lock.close()


def _report(rebuilt: Rebuilt, aside: Path | None, as_json: bool, disaster: bool) -> None:
    rate = rebuilt.instances / rebuilt.seconds if rebuilt.seconds else 0
    found = {
        "instances": rebuilt.instances,
        "unreadable": len(rebuilt.unreadable),
        "damaged": rebuilt.damaged,
        "deleted": rebuilt.deleted,
        "old_catalogue": rebuilt.old_catalogue,
        "names": rebuilt.names,
        "names_lost": rebuilt.names_lost,
        "files_per_s": round(rate),
    }

    def text() -> str:
        lines = [f"{rebuilt.instances} instances in {rebuilt.seconds:.1f} s, {rate:.0f} files/s"]
        if not rebuilt.old_catalogue and aside:
            lines.append("the old catalogue couldn't be read: what its volumes don't know to be deleted may be back")
            lines.append("disks that were added while the gateway ran count only if [storage] volumes lists them")
        if rebuilt.names:
            lines.append(f"{rebuilt.names} names of the share's files, from the old catalogue")
        if rebuilt.names_lost:
            lines.append("the names of the share's files can't be read; their bytes stay below files/ of each volume")
        if rebuilt.damaged:
            lines.append(f"{rebuilt.damaged} files aren't what was stored; they weren't taken")
        if rebuilt.deleted:
            lines.append(f"{rebuilt.deleted} files of deleted or replaced instances weren't taken")
        if rebuilt.unreadable:
            lines.append(f"{len(rebuilt.unreadable)} files aren't complete DICOM objects; they stay where they are")
        if disaster:
            lines.append("next: start the gateway and `tandem ha`, then `tandem failover --force` on this node")
        return "\n".join(lines)

    say(found, as_json, text)


COMMANDS: tuple[click.Command, ...] = (rebuild_index,)
