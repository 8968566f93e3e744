"""`tandem share user ...`: who may use the share over SMB."""

import getpass
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from conf.settings import Settings
from storage.control import USER_NAME
from tools.cli.exits import EXIT_CONFIG, EXIT_FAILED
from tools.cli.operate import ordered
from tools.cli.options import Failure, config_option, json_option, settings_of
from tools.cli.say import say

KNOWN_WITHIN_S: Final = 15.0  # by smbd, after the log has it

name_argument = click.argument("name")


@click.group()
def share() -> None:
    """The share: files and archive over SMB."""


@share.group()
def user() -> None:
    """Users of the share, the same on both nodes. Done on the primary."""


@user.command("add")
@config_option
@name_argument
@json_option
def add(config: Path | None, name: str, as_json: bool) -> None:
    """Let NAME use the share. The password is asked for; where standard input isn't a terminal it is read from there,
    twice, a line each."""
    if not USER_NAME.fullmatch(name):
        hint = "small letters, digits, - and _, 32 at most, a letter first; clients may write it in any case"
        raise Failure(f"{name!r} can't be the name of a user: {hint}", EXIT_CONFIG)
    from ha.reach.share_users import uid_of

    try:
        uid_of(name)
    except KeyError:
        pass  # it is made
    except OSError as error:
        raise Failure(f"{error.strerror}: choose another name", EXIT_CONFIG) from None
    _set(config, name, as_json, is_new=True)


@user.command("password")
@config_option
@name_argument
@json_option
def password(config: Path | None, name: str, as_json: bool) -> None:
    """Give NAME another password. What is connected stays so."""
    _set(config, name, as_json, is_new=False)


@user.command("remove")
@config_option
@name_argument
@json_option
def remove(config: Path | None, name: str, as_json: bool) -> None:
    """Let NAME in no more, and end what it has connected. Its files stay."""
    ordered(config, "share-user-remove", name=name)
    _wait(settings_of(config), lambda lines: not any(line.startswith(f"{name}:") for line in lines))
    say({"user": name, "removed": True}, as_json, f"{name}: removed, on both nodes")


@user.command("list")
@config_option
@json_option
def list_(config: Path | None, as_json: bool) -> None:
    """Show the users."""
    first = settings_of(config).share.first_uid
    rows: list[dict[str, Any]] = [
        {"name": row["name"], "uid": first + row["number"], "password_set": _iso(row["set_ns"])}
        for row in ordered(config, "share-users")["users"]
    ]
    say({"users": rows}, as_json, lambda: _text(rows))


def _text(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no users; `tandem share user add NAME` makes one"
    return "\n".join(f"{row['name']}: uid {row['uid']}, password set {row['password_set']}" for row in rows)


def _iso(ns: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(ns / 1e9))


def _set(config: Path | None, name: str, as_json: bool, *, is_new: bool) -> None:
    settings = settings_of(config)
    hashed = nt_hash(_asked())
    ordered(config, "share-user-set", name=name, nt_hash=hashed, is_new=is_new)
    known = _wait(
        settings,
        lambda lines: any(line.startswith(f"{name}:") and f":{hashed.upper()}:" in line for line in lines),
    )
    if not settings.share.enabled:
        hint = "; nothing is shown over SMB yet: enabled = true under [share]"
    elif not known:
        hint = f"; smbd on node {settings.node.name} doesn't know it yet: is `tandem ha` running?"
    else:
        hint = ""
    text = f"{name}: {'added' if is_new else 'password changed'}, on both nodes{hint}"
    say({"user": name, "known": known}, as_json, text)


def _asked() -> str:
    """A password, given twice."""
    if sys.stdin.isatty():
        given, again = getpass.getpass("Password: "), getpass.getpass("Again: ")
    else:
        given, again = (sys.stdin.readline().rstrip("\r\n") for _ in range(2))
    if not given:
        raise Failure("no password was given", EXIT_CONFIG)
    if given != again:
        raise Failure("the two passwords differ; nothing was changed", EXIT_CONFIG)
    return given


def nt_hash(password: str) -> str:
    """What SMB knows of a password: MD4 of its UTF-16 (MS-NLMP 3.3.1), 32 hexadecimal digits."""
    try:
        from Crypto.Hash import MD4
    except ImportError:
        raise Failure("pycryptodome isn't installed: pip install 'tandem-dicom[share]'", EXIT_FAILED) from None
    digest: str = MD4.new(password.encode("utf-16-le")).hexdigest()
    return digest


def _wait(settings: Settings, is_so: Callable[[list[str]], bool]) -> bool:
    """Until smbd's list of users here is as it should, as far as this process may look; False if it takes long."""
    from ha.reach.samba import passwords_of

    passwords = passwords_of(settings)
    deadline = time.monotonic() + KNOWN_WITHIN_S
    while settings.share.enabled and time.monotonic() < deadline:
        try:
            lines = passwords.read_text().splitlines()
        except PermissionError:
            return True
        except OSError:
            lines = []
        if is_so(lines):
            return True
        time.sleep(0.1)
    return False


COMMANDS: Final = (share,)
