"""`tandem rebuild-index`: its command line."""

import json
import shutil
import sys
from pathlib import Path

import click

from storage.objects.volume import VolumeOffline
from storage.state.kv import CatalogueDamaged
from tools.cli.client import ask
from tools.cli.options import Failure, config_option, settings_of
from tools.cli.rebuild import catalogue_path, check_volumes, from_files, set_aside


@click.command("rebuild-index")
@config_option
@click.option("--from", "source", type=click.Choice(["files", "peer"]), default="files", show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Processes that read files.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def rebuild_index(config: Path | None, source: str, jobs: int, as_json: bool) -> None:
    """Make a node's catalogue anew, while its gateway doesn't run. The old one is set aside.

    `files`: from the readable trees of its volumes. `peer`: the node begins anew as a stranger, follows the other node
    and takes over the files that lie here; the way to go whenever the other node is well.
    """
    settings = settings_of(config)
    try:
        ask(settings.control_socket)
    except OSError:
        pass
    else:
        raise Failure(f"the gateway of node {settings.node.name} runs; stop it first", 1)
    if source == "peer" and settings.cluster is None:
        raise Failure("this node has no peer", 2)
    if source == "files":
        try:
            check_volumes(settings)
        except VolumeOffline as error:
            raise Failure(f"{error}; mount it first, or take it out of [storage] volumes", 1) from error
    aside = set_aside(settings)
    if aside:
        click.echo(f"the old catalogue is in {aside}", err=True)
    if source == "peer":
        click.echo("the node begins anew when its gateway starts")
        return
    try:
        with click.progressbar(length=1, label="reading files", file=sys.stderr) as bar:

            def progress(done: int, of: int) -> None:
                bar.length = max(1, of)
                bar.update(done - bar.pos)

            rebuilt = from_files(settings, progress, jobs)
    except (OSError, CatalogueDamaged, VolumeOffline) as error:
        shutil.rmtree(catalogue_path(settings), ignore_errors=True)
        if aside:
            aside.rename(catalogue_path(settings))
        raise Failure(f"can't rebuild: {error}; the old catalogue is where it was", 1) from error
    rate = rebuilt.instances / rebuilt.seconds if rebuilt.seconds else 0
    if as_json:
        found = {"instances": rebuilt.instances, "unreadable": len(rebuilt.unreadable), "files_per_s": round(rate)}
        click.echo(json.dumps(found))
        return
    click.echo(f"{rebuilt.instances} instances in {rebuilt.seconds:.1f} s, {rate:.0f} files/s")
    if rebuilt.unreadable:
        click.echo(f"{len(rebuilt.unreadable)} files aren't complete DICOM objects; they stay where they are")
