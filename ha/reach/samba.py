"""Runs the distribution's smbd where the virtual address is. A restarted agent finds it by its pid file."""

import contextlib
import hashlib
import json
import os
import pwd
import select
import shlex
import signal
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import structlog

from conf.mounts import FILES, Mount, files_at
from conf.settings import Settings

log = structlog.get_logger()

INCLUDED: Final = "/etc/tandem/smb.local.conf"  # need not be there
STOP_S: Final = 3.0
START_TIMEOUT_S: Final = 15.0
MOUNTED_TRIES: Final = 100  # a tenth of a second each, for which a client waits until the files are there
SIGNING: Final = {"auto": "auto", "required": "mandatory"}


def passwords_of(settings: Settings) -> Path:
    """Where smbd looks up users: smbpasswd(5)."""
    return settings.share.folder / "private" / "smbpasswd"


class Samba:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.share.folder
        self.config = self._folder / "smb.conf"

    @property
    def pid(self) -> int | None:
        """Process ID of our smbd if it is running."""
        try:
            pid = int((self._folder / "smbd.pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if str(self.config).encode() in command else None

    @property
    def files(self) -> Mount | None:
        """Where the share's files are shown, None if they aren't."""
        return files_at(self._settings.share.mount) if self._settings.share.files else None

    @property
    def wants_files(self) -> bool:
        return bool(self._settings.share.files)

    def start(self) -> None:
        """Start smbd unless it runs. Raises OSError or subprocess.SubprocessError."""
        if self.pid is not None:
            return
        self._write_config()
        self._set_sid()
        self._run("smbd", "--daemon", f"--configfile={self.config}")
        log.info("smbd.started")

    def stop(self) -> None:
        pid = self.pid
        if pid is None:
            return
        for number, wait_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            if _ended(pid, number, wait_s):
                break
        log.info("smbd.stopped")

    def let_go_of_files(self) -> None:
        """Have those connected to the files connect anew: what they had open was in a mount that is no more. Their
        connections are ended: `close-share` leaves requests that are under way without an answer, and who waits for one
        waits for ever. Raises OSError, subprocess.SubprocessError or ValueError."""
        shares = {self._settings.share.files, self._settings.share.takes_in}
        for one in self._listed("--shares", "tcons"):
            if one["service"] in shares:
                end_connection(one)
        log.info("smbd.files_anew")

    def sessions(self) -> list[dict[str, Any]]:
        """As smbstatus(1) lists them. Raises OSError, subprocess.SubprocessError or ValueError."""
        return self._listed("--processes", "sessions")

    def _listed(self, what: str, key: str) -> list[dict[str, Any]]:
        shown = self._run("smbstatus", f"--configfile={self.config}", what, "--json")
        return list(json.loads(shown).get(key, {}).values())

    def _run(self, *command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=START_TIMEOUT_S).stdout

    # -- configuration -----------------------------------------------------------------------------------------

    def _write_config(self) -> None:
        share = self._settings.share
        for name, mode in (("", 0o755), ("ncalrpc", 0o755), ("log", 0o750), ("private", 0o700)):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
            (self._folder / name).chmod(mode)  # whatever the umask
        passwords_of(self._settings).touch(0o600)
        state = self._settings.storage.state
        try:
            user = pwd.getpwuid(state.stat().st_uid).pw_name  # the gateway's, not ours
        except KeyError:
            raise OSError(0, f"the owner of {state} has no name on this machine") from None
        text = _part(
            "global",
            netbios_name=share.netbios_name,
            map_to_guest="Bad User" if share.guest else "Never",
            passwords=passwords_of(self._settings),
            port=share.port,
            signing=SIGNING[share.signing],
            encryption="off" if share.encryption == "off" else "default",  # each share says for itself
            folder=self._folder,
            include=INCLUDED,
            log_level="0 full_audit:1" if share.audit else "0",
            hosts=" ".join(share.hosts_allow) or "ALL",
        )
        archive = state / "share" / "archive"
        text += _part(
            "archive",
            name=share.name,
            path=archive,
            guest="yes" if share.guest else "no",
            encryption="default" if share.guest else share.encryption,  # guests have no keys
            user=user,
        )
        if share.macos:  # on all shares or none, says Samba
            text += "    vfs objects = fruit streams_xattr\n" + _part("macos")
        if share.files:
            text += self._files(share.files, share.mount, "Tandem files, on both nodes", user)
        if share.takes_in:
            text += self._files(share.inbox, share.mount / share.inbox, "Taken into the Tandem archive", user)
        self.config.write_text(text, encoding="utf-8")

    def _files(self, name: str, path: Path, comment: str, user: str) -> str:
        share = self._settings.share
        mounted = self._folder / "mounted.sh"
        mounted.write_text(_mounted(share.mount))
        modules = [
            *(["full_audit"] if share.audit else []),
            *(["recycle"] if share.recycle else []),
            *(["fruit"] if share.macos else []),
            "streams_xattr",
            *(["acl_xattr"] if share.acls == "windows" else []),
            "glusterfs_fuse",  # asks the file system for the name in any case, instead of reading the folder
        ]
        parts = [f"{share.acls}-acls"]
        parts += [option for option in ("recycle", "audit", "macos") if getattr(share, option)]
        if path != share.mount:  # what is deleted in the inbox mustn't turn up in it again
            modules, parts = ([one for one in these if one != "recycle"] for these in (modules, parts))
        shown = {"name": name, "path": path, "comment": comment}
        text = _part(
            "files", **shown, encryption=share.encryption, user=user, mounted=mounted, objects=" ".join(modules)
        )
        return text + "".join(_part(name) for name in parts)

    def _set_sid(self) -> None:
        """The same on both nodes, so that users and permissions are."""
        name = self._settings.cluster.name if self._settings.cluster else self._settings.node.name
        known = self._folder / "sid"
        sid = sid_of(name, self._settings.share.netbios_name)
        if known.exists() and known.read_text() == sid and (self._folder / "private" / "secrets.tdb").exists():
            return
        self._run("net", f"--configfile={self.config}", "setlocalsid", sid)
        known.write_text(sid)


def sid_of(cluster: str, netbios_name: str) -> str:
    """The security identifier of a cluster as a Windows machine (MS-DTYP 2.4.2)."""
    digest = hashlib.sha256(f"{cluster}\0{netbios_name}".encode()).digest()
    parts = (int.from_bytes(digest[at : at + 4], "big") for at in (0, 4, 8))
    return "S-1-5-21-" + "-".join(map(str, parts))


def _part(part: str, /, **values: object) -> str:
    return files("conf").joinpath("samba", f"{part}.conf").read_text(encoding="utf-8").format(**values)


def _mounted(folder: Path) -> str:
    """A script that ends well once the files are there and may be written, and the folder that it is given is, too."""
    shown = str(folder).replace("\\", r"\134").replace(" ", r"\040")  # as the kernel writes it
    looked_for = shlex.quote(f" {shown} {FILES} rw,")
    return (
        f'n=0\nuntil grep -qF {looked_for} /proc/self/mounts && [ -d "$1" ]; do\n'
        f"    n=$((n + 1)); [ $n -le {MOUNTED_TRIES} ] || exit 1; sleep 0.1\ndone\n"
    )


def _ended(pid: int, number: int, wait_s: float) -> bool:
    """Signal smbd and wait for its end; False if it goes on."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        _signal_group(pid, number)
        return bool(select.select([process], [], [], wait_s)[0])
    finally:
        os.close(process)


def _signal_group(pid: int, number: int) -> None:
    """smbd leads a process group with one process for each client."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return


def end_connection(row: dict[str, Any]) -> None:
    """End the process of smbd that serves a client, by what smbstatus(1) says of it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(row["server_id"]["pid"]), signal.SIGTERM)
