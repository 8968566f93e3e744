"""Which node a command is about: `--config FILE` or TANDEM_CONFIG."""

import os
import sys
from pathlib import Path
from typing import IO, Any

import click

from conf.settings import Settings, SettingsError, load

CONFIG_VARIABLE = "TANDEM_CONFIG"
EXIT_CONFIG = 2


class Failure(click.ClickException):
    """One line for the person at the terminal."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"tandem: {self.message}", err=True)
        sys.exit(self.code)


config_option = click.option(
    "--config", type=click.Path(path_type=Path), help=f"Settings of the node; default: ${CONFIG_VARIABLE}."
)


def settings_of(config: Path | None) -> Settings:
    if config is None:
        named = os.environ.get(CONFIG_VARIABLE)
        if not named:
            raise Failure(f"which node? Give --config FILE or set {CONFIG_VARIABLE}", EXIT_CONFIG)
        config = Path(named)
    try:
        return load(config)
    except SettingsError as error:
        raise Failure(str(error), EXIT_CONFIG) from None


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


def dicom_host(settings: Settings) -> str:
    """Where DICOM is served: the virtual address, or this machine for a node by itself."""
    return str(settings.cluster.vips[0].ip.ip) if settings.cluster and settings.cluster.vips else "127.0.0.1"
