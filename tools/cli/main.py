"""The `tandem` command."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click
import structlog

from conf import VERSION
from conf.settings import ENV_PREFIX, Settings, SettingsError, build, overridden
from storage.objects.volume import MARKER, create_marker
from tools.cli.client import ask, render, watch_status
from tools.cli.cluster import COMMANDS as CLUSTER_COMMANDS
from tools.cli.drill import COMMANDS as DRILL_COMMANDS
from tools.cli.init import COMMANDS as INIT_COMMANDS
from tools.cli.operate import COMMANDS as OPERATOR_COMMANDS
from tools.cli.options import EXIT_CONFIG, Failure, config_option, settings_of
from tools.cli.rebuild_command import rebuild_index
from tools.cli.transfer import COMMANDS as TRANSFER_COMMANDS

EXIT_AWAY = 3


def configure_log(settings: Settings) -> None:
    renderer: Any = structlog.processors.JSONRenderer()
    if settings.log.format == "text":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.log.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="tandem")
def main() -> None:
    """Tandem: a DICOM storage gateway for two nodes. Every image is on both before the sender hears Success."""


@main.command()
@config_option
@click.option("--data", type=click.Path(path_type=Path), help="Run alone, with everything below this folder.")
@click.option("--port", type=int, help="DICOM port, with --data (default 11112).")
@click.option("--aet", help="AE title, with --data (default TANDEM).")
def gateway(config: Path | None, data: Path | None, port: int | None, aet: str | None) -> None:
    """Run the data plane: DICOM in and out, storage, replication.

    With --data DIR it runs alone: no config file, no root, no etcd.
    """
    from gateway.app import EXIT_FATAL, run
    from storage.state.kv import CatalogueDamaged

    settings = standalone(data, port, aet) if data else settings_of(config)
    configure_log(settings)
    try:
        code = run(settings)
    except (OSError, CatalogueDamaged) as error:
        raise Failure(f"can't start: {error}", 1) from error
    if code == EXIT_FATAL:
        os._exit(code)  # at once: worker threads may hang on a dead disk
    sys.exit(code)


def standalone(data: Path, port: int | None, aet: str | None) -> Settings:
    """Settings for a gateway by itself. Its folder becomes a volume at the first start."""
    data = data.resolve()
    volume = data / "volume"
    if not (volume / MARKER).exists():
        try:
            create_marker(volume)
        except OSError as error:
            raise Failure(f"{volume}: {error.strerror}", 1) from error
    dicom = {key: value for key, value in (("port", port), ("aet", aet)) if value is not None}
    raw: dict[str, Any] = {
        "node": {"run_dir": str(data)},
        "dicom": dicom,
        "storage": {"state": str(data / "state"), "volumes": [str(volume)]},
        "log": {"format": "text"},
    }
    try:
        return build(overridden(raw, os.environ), "--data")
    except SettingsError as error:
        raise Failure(str(error), EXIT_CONFIG) from None


@main.command()
@config_option
def ha(config: Path | None) -> None:
    """Run the control plane: lease, decisions, virtual address, share. Needs root and a [cluster] section."""
    from ha.app import run

    settings = settings_of(config)
    if settings.cluster is None:
        raise Failure("the settings have no [cluster] section; a gateway by itself needs no `tandem ha`", EXIT_CONFIG)
    configure_log(settings)
    sys.exit(run(settings))


@main.command("check-config")
@click.argument("file", type=click.Path(path_type=Path))
def check_config(file: Path) -> None:
    """Check a settings file; exit 2 and one line if something is wrong."""
    settings = settings_of(file)
    kind = f"cluster {settings.cluster.name}, peer {settings.cluster.peer}" if settings.cluster else "standalone"
    click.echo(f"{file}: ok, node {settings.node.name}, {kind}")
    ignored = [name for name in os.environ if name.startswith(ENV_PREFIX)]
    if ignored:
        click.echo(f"overridden from the environment: {', '.join(sorted(ignored))}")


@main.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object; with --watch one a line.")
@click.option("--watch", is_flag=True, help="Look again every second, until Ctrl-C.")
def status(config: Path | None, as_json: bool, watch: bool) -> None:
    """Show role, in-sync set, volumes and counts of this node. Exit 3 if its gateway is not running."""
    settings = settings_of(config)
    if watch:
        watch_status(settings, as_json)
        return
    try:
        found = ask(settings.control_socket)
    except OSError as error:
        raise Failure(f"the gateway of node {settings.node.name} isn't running ({error.strerror})", EXIT_AWAY) from None
    click.echo(json.dumps(found) if as_json else render(found))


@main.group()
def lab() -> None:
    """A pair on this one machine, in network namespaces: for trying, demonstrating and testing. Needs root."""


def _add_lab_commands() -> None:
    from tools.lab.commands import COMMANDS

    for command in COMMANDS:
        lab.add_command(command)


_add_lab_commands()
for operator_command in (
    *OPERATOR_COMMANDS,
    *TRANSFER_COMMANDS,
    *CLUSTER_COMMANDS,
    *DRILL_COMMANDS,
    *INIT_COMMANDS,
    rebuild_index,
):
    main.add_command(operator_command)
