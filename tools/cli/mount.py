"""`tandem mount DIR`: the share as a local folder."""

import sys
from pathlib import Path
from typing import Final

import click

from tools.cli.exits import EXIT_AWAY, EXIT_FAILED
from tools.cli.options import Failure, config_option, settings_of


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@config_option
@click.option("--data", type=click.Path(path_type=Path), help="Of a gateway that runs with this --data.")
def mount(folder: Path | None, config: Path | None, data: Path | None) -> None:
    """Mount the share's files on FOLDER ([share] mount), until it is unmounted (umount FOLDER) or this is ended.

    In a pair it follows what the node is: on the primary it may be read and written, on the standby read; what is open
    is closed at a failover. What is flushed (close, fsync) is durable, on both nodes while both are in sync, and so is
    each mkdir, rename, link and unlink when it returns. Needs the gateway of this node, /dev/fuse
    and pyfuse3 (pip install 'tandem-dicom[share]').
    """
    from tools.cli.main import configure_log, standalone

    settings = standalone(data, None, None) if data else settings_of(config)
    configure_log(settings)
    try:
        from gateway.share.app import run
    except ImportError:
        raise Failure("pyfuse3 isn't installed: pip install 'tandem-dicom[share]'", EXIT_FAILED) from None
    try:
        why = run(settings, folder or settings.share.mount)
    except OSError as error:
        raise Failure(str(error.strerror or error), EXIT_AWAY) from error
    if why:
        click.echo(f"unmounted: {why}", err=True)
        sys.exit(EXIT_AWAY)


COMMANDS: Final = (mount,)
