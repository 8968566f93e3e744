"""The `tandem` command: its groups, and the processes themselves. What a command needs is imported when it is run."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any, Final

import click

from conf import VERSION
from conf.settings import ENV_PREFIX, Settings, SettingsError, build, overridden
from tools.cli.exits import EXIT_AWAY, EXIT_CONFIG, EXIT_FAILED, EXIT_FATAL
from tools.cli.options import CONFIG_VARIABLE, Failure, config_option, json_option, settings_of
from tools.cli.say import say

# command -> (module, what it is called there)
ELSEWHERE: Final = {
    **dict.fromkeys(("volume", "scrub", "verify", "delete", "get", "conflicts", "quarantine"), "tools.cli.operate"),
    **dict.fromkeys(
        ("switchover", "failover", "pause", "resume", "history", "why", "risk"),
        "tools.cli.cluster",
    ),
    **dict.fromkeys(("drill", "maintenance"), "tools.cli.drill"),
    **dict.fromkeys(("init", "renew"), "tools.cli.init"),
    **dict.fromkeys(("import", "export", "hash-password"), "tools.cli.transfer"),
    "rebuild-index": "tools.cli.rebuild_command",
    "mount": "tools.cli.mount",
    "share": "tools.cli.share",
    "inbox": "tools.cli.inbox",
    "lab": "tools.lab.commands",
}


class LazyGroup(click.Group):
    """Groups and commands of other files are imported when they are named: `tandem status` is asked often."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *ELSEWHERE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = ELSEWHERE.get(cmd_name)
        if module is None:
            return super().get_command(ctx, cmd_name)
        found = {command.name: command for command in importlib.import_module(module).COMMANDS}
        return found.get(cmd_name)


def configure_log(settings: Settings) -> None:
    from conf.telling import configure

    configure(settings.log)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar=CONFIG_VARIABLE,
    help=f"Settings of the node that a command is about; default: ${CONFIG_VARIABLE}.",
)
@click.version_option(VERSION, prog_name="tandem")
def main(config: Path | None) -> None:
    """Tandem: a DICOM storage gateway for two nodes. Every image is on both before the sender hears Success.

    Exit codes: 0 done; 1 it didn't work; 2 wrong settings or arguments; 3 what was asked isn't running; 4 the answer is
    one to look at (blocked, different, refused, at risk).
    """


@main.command()
@config_option
@click.option("--data", type=click.Path(path_type=Path), help="Run alone, with everything below this folder.")
@click.option("--port", type=int, help="DICOM port, with --data (default 11112).")
@click.option("--aet", help="AE title, with --data (default TANDEM).")
def gateway(config: Path | None, data: Path | None, port: int | None, aet: str | None) -> None:
    """Run the data plane: DICOM in and out, storage, replication.

    With --data DIR it runs alone: no config file, no root, no etcd.
    """
    from gateway.app import run
    from storage.log.folder import LogDamaged
    from storage.state.kv import CatalogueDamaged

    if data is None and (port is not None or aet is not None):
        raise Failure("--port and --aet are for --data; with --config they stand in the file, [dicom]", EXIT_CONFIG)
    said_here = click.get_current_context().get_parameter_source("config") is click.core.ParameterSource.COMMANDLINE
    if data is not None and said_here:
        raise Failure("either --config FILE or --data DIR", EXIT_CONFIG)
    if data is None and config is None:
        raise Failure(f"give --data DIR to run alone, or --config FILE (or ${CONFIG_VARIABLE})", EXIT_CONFIG)
    settings = standalone(data, port, aet) if data else settings_of(config)
    configure_log(settings)
    try:
        code = run(settings, lambda: standalone(data, port, aet) if data else settings_of(config))
    except (OSError, CatalogueDamaged, LogDamaged) as error:
        raise Failure(f"can't start: {getattr(error, 'strerror', None) or error}", EXIT_FAILED) from error
    if code == EXIT_FATAL:
        os._exit(code)  # at once: worker threads may hang on a dead disk
    sys.exit(code)


def standalone(data: Path, port: int | None, aet: str | None) -> Settings:
    """Settings for a gateway by itself. Its folder becomes a volume at the first start."""
    from storage.objects.local_volume import create_marker
    from storage.objects.volume import MARKER

    data = data.resolve()
    volume = data / "volume"
    if not (volume / MARKER).exists():
        try:
            create_marker(volume)
        except OSError as error:
            raise Failure(f"{volume}: {error.strerror}", EXIT_FAILED) from error
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
@json_option
def check_config(file: Path, as_json: bool) -> None:
    """Check a settings file; exit 2 and one line if something is wrong."""
    settings = settings_of(file)
    kind = f"cluster {settings.cluster.name}, peer {settings.cluster.peer}" if settings.cluster else "standalone"
    ignored = sorted(name for name in os.environ if name.startswith(ENV_PREFIX))
    more = f"\noverridden from the environment: {', '.join(ignored)}" if ignored else ""
    result = {"file": str(file), "node": settings.node.name, "kind": kind, "overridden": ignored}
    say(result, as_json, f"{file}: ok, node {settings.node.name}, {kind}{more}")


@main.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object; with --watch one a line.")
@click.option("--watch", is_flag=True, help="Look again every second, until Ctrl-C.")
def status(config: Path | None, as_json: bool, watch: bool) -> None:
    """Show role, in-sync set, volumes and counts of this node. Exit 3 if its gateway is not running."""
    from storage.control_client import ask
    from tools.cli.status import render, watch_status

    settings = settings_of(config)
    if watch:
        watch_status(settings, as_json)
        return
    try:
        found = ask(settings.control_socket)
    except OSError as error:
        raise Failure(f"the gateway of node {settings.node.name} isn't running ({error.strerror})", EXIT_AWAY) from None
    say(found, as_json, lambda: render(found))
