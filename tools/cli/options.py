"""What commands have in common: which node they are about, and how they fail."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from conf.settings import Settings, SettingsError, load
from tools.cli.exits import EXIT_CONFIG

F = TypeVar("F", bound=Callable[..., Any])
CONFIG_VARIABLE = "TANDEM_CONFIG"


class Failure(click.ClickException):
    """One line for the person at the terminal."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        click.echo(f"tandem: {self.message}", err=True)


def _chosen(context: click.Context, _: click.Parameter, value: Path | None) -> Path | None:
    """Said behind the command, or before it (`tandem --config FILE COMMAND`), or in the environment."""
    if value is not None:
        return value
    named: Path | None = context.find_root().params.get("config")
    return named


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    callback=_chosen,
    help=f"Settings of the node; also before the command; default: ${CONFIG_VARIABLE}.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object.")
yes_option = click.option("--yes", is_flag=True, help="Don't ask.")


def settings_of(config: Path | None) -> Settings:
    if config is None:
        raise Failure(f"which node? Give --config FILE or set {CONFIG_VARIABLE}", EXIT_CONFIG)
    try:
        return load(config)
    except SettingsError as error:
        raise Failure(str(error), EXIT_CONFIG) from None


def sure(question: str, yes: bool) -> None:
    """Ask before what can't be undone. Raises click.Abort."""
    if not yes:
        click.confirm(question, abort=True, err=True)


def give_to_gateway(settings: Settings, *paths: Path) -> None:
    """What root makes here belongs to the user that the gateway runs as, who owns the state folder. Raises OSError."""
    if os.geteuid() != 0:
        return
    for path in paths:
        if owner_differs(settings, path):
            owner = settings.storage.state.stat()
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def owner_differs(settings: Settings, path: Path) -> bool:
    """Whether a path belongs to another user than the state folder."""
    state = settings.storage.state
    return state.exists() and path.lstat().st_uid != state.stat().st_uid


def login() -> tuple[str, str] | None:
    """Name and password for [dicom] users from TANDEM_USER and TANDEM_PASSWORD, None without."""
    name = os.environ.get("TANDEM_USER", "")
    return (name, os.environ.get("TANDEM_PASSWORD", "")) if name else None


def dicom_host(settings: Settings) -> str:
    """Where DICOM is served: the virtual address, or this machine for a node by itself."""
    return str(settings.cluster.vips[0].ip.ip) if settings.cluster and settings.cluster.vips else "127.0.0.1"
