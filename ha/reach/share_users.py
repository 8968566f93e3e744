"""The share's users on this machine: an account and an entry in smbpasswd(5) for each that the log has.

On the standby as well, so that it knows them when it takes over. Accounts can't log in: smbd wants one for each user,
and does all work as the gateway's. What a removed user has open is ended.
"""

import asyncio
import os
import pwd
import subprocess
from dataclasses import dataclass
from typing import Any, Final

import structlog

from conf.settings import Settings
from ha.reach.samba import Samba, end_connection, passwords_of
from storage.control import NT_HASH, USER_NAME
from storage.control_client import order

log = structlog.get_logger()

LOOK_S: Final = 1.0
ASKING_S: Final = 5.0
TIMEOUT_S: Final = 30.0
NO_LANMAN: Final = "X" * 32
NUMBERS_MAX: Final = 1_000_000
SYSTEM_UIDS: Final = 1000  # below are accounts of the system, which are no users of a share


@dataclass(frozen=True)
class User:
    name: str
    uid: int
    nt_hash: str  # 32 hexadecimal digits
    set_at: int  # seconds since the epoch

    @property
    def line(self) -> str:
        """Of smbpasswd(5)."""
        account = "[U          ]"
        return f"{self.name}:{self.uid}:{NO_LANMAN}:{self.nt_hash.upper()}:{account}:LCT-{self.set_at:08X}:\n"


class ShareUsers:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._passwords = passwords_of(settings)
        cluster = settings.cluster.name if settings.cluster else settings.node.name
        self._comment = f"Tandem share {cluster}"
        self._listed: list[dict[str, Any]] | None = None
        self._leaving: dict[str, int] = {}  # uid by name of those who are to be gone from here
        self._said: dict[str, str] = {}

    async def run(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.look)
            except Exception as error:  # whatever it is: users that are removed must go
                self._say("", f"{type(error).__name__}: {error}")
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Have this machine know whom the log knows. Raises OSError or OrderFailed if the gateway doesn't say."""
        listed = order(self._settings.control_socket, "share-users", {}, timeout_s=ASKING_S)["users"]
        self._say("", "")
        if listed == self._listed:
            return
        users = [user for row in listed if (user := self._user(row)) is not None]
        known, names = self._known(), {user.name for user in users}
        self._leaving |= {name: uid for name, uid in known.items() if name not in names}
        self._write("".join(user.line for user in users))
        self._leaving = {name: uid for name, uid in self._leaving.items() if name not in names}
        if self._leaving:
            self._end_sessions(set(self._leaving.values()))
            for name in self._leaving:
                self._remove(name)
            self._leaving = {}
        if len(users) == len(listed):
            self._listed = listed
        log.info("share.users", count=len(users))

    def _user(self, row: dict[str, Any]) -> User | None:
        """With an account of this machine; None if it can't have one."""
        name, number, nt_hash = str(row["name"]), int(row["number"]), str(row["nt_hash"])
        # The gateway has fewer rights than we: what it says mayn't be more than it is.
        if not (USER_NAME.fullmatch(name) and NT_HASH.fullmatch(nt_hash) and 0 <= number < NUMBERS_MAX):
            self._say(repr(name), "the gateway names a user that can't be")
            return None
        try:
            uid = self._account(name, self._settings.share.first_uid + number)
        except (OSError, subprocess.SubprocessError) as error:
            self._say(name, str(getattr(error, "stderr", "") or error).strip())
            return None
        return User(name, uid, nt_hash, int(row["set_ns"]) // 10**9)

    def _account(self, name: str, uid: int) -> int:
        try:
            return uid_of(name)
        except KeyError:
            pass
        # What its files are belongs to the gateway's user: the account has a number, and nothing else.
        made = ["useradd", "--uid", str(uid), "--no-user-group", "--gid", "nogroup", "--no-log-init"]
        made += ["--no-create-home", "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin"]
        made += ["--comment", self._comment, name]
        try:
            _run(*made)
        except subprocess.SubprocessError:
            try:
                return uid_of(name)  # somebody else has just made it
            except KeyError:
                pass
            raise
        return uid

    def _remove(self, name: str) -> None:
        """The account goes if it was made for this."""
        try:
            if pwd.getpwnam(name).pw_gecos == self._comment:
                _run("userdel", name)
        except KeyError:
            return
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("share.account_left", user=name, error=str(getattr(error, "stderr", "") or error).strip())

    def _end_sessions(self, uids: set[int]) -> None:
        """Raises OSError, subprocess.SubprocessError or ValueError: then it is tried again."""
        samba = Samba(self._settings)
        if samba.pid is None:
            return
        for session in samba.sessions():
            if int(session["uid"]) in uids:
                end_connection(session)

    def _known(self) -> dict[str, int]:
        """uid by name, as smbd has them now."""
        try:
            rows = [line.split(":") for line in self._passwords.read_text().splitlines() if line.count(":") > 1]
        except FileNotFoundError:
            return {}
        return {row[0]: int(row[1]) for row in rows}

    def _write(self, text: str) -> None:
        self._passwords.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = self._passwords.with_suffix(".new")
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._passwords)

    def _say(self, name: str, why: str) -> None:
        if why and self._said.get(name) != why:
            log.warning("share.user_unknown" if name else "share.users_unknown", user=name, why=why)
        self._said[name] = why


def uid_of(name: str) -> int:
    """Raises KeyError for one that isn't there, OSError for one of the system's own."""
    uid = pwd.getpwnam(name).pw_uid
    if uid < SYSTEM_UIDS:
        raise OSError(0, f"{name} is an account of the system")
    return uid


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout
