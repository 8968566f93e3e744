"""Runs the distribution's smbd where the virtual address is. A restarted agent finds it by its pid file."""

import os
import pwd
import select
import signal
import subprocess
from importlib.resources import files
from pathlib import Path

import structlog

from conf.settings import Settings

log = structlog.get_logger()

INCLUDED = "/etc/tandem/smb.local.conf"  # need not be there
STOP_S = 3.0
START_TIMEOUT_S = 15.0


class Samba:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.share.folder
        self._config = self._folder / "smb.conf"

    @property
    def pid(self) -> int | None:
        """Process ID of our smbd if it is running."""
        try:
            pid = int((self._folder / "smbd.pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if str(self._config).encode() in command else None

    def start(self) -> None:
        """Start smbd unless it runs. Raises OSError or subprocess.SubprocessError."""
        if self.pid is not None:
            return
        self._write_config()
        subprocess.run(
            ["smbd", "--daemon", f"--configfile={self._config}"],
            check=True,
            capture_output=True,
            timeout=START_TIMEOUT_S,
        )
        log.info("smbd.started")

    def stop(self) -> None:
        pid = self.pid
        if pid is None:
            return
        for number, wait_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            if _ended(pid, number, wait_s):
                break
        log.info("smbd.stopped")

    def _write_config(self) -> None:
        share = self._settings.share
        for name, mode in (("ncalrpc", 0o755), ("log", 0o750), ("private", 0o700)):
            (self._folder / name).mkdir(parents=True, exist_ok=True, mode=mode)
        state = self._settings.storage.state
        try:
            user = pwd.getpwuid(state.stat().st_uid).pw_name  # the gateway's, not ours
        except KeyError:
            raise OSError(0, f"the owner of {state} has no name on this machine") from None
        template = files("conf").joinpath("smb.conf").read_text(encoding="utf-8")
        text = template.format(
            netbios_name=share.netbios_name,
            user=user,
            port=share.port,
            folder=self._folder,
            name=share.name,
            path=state / "share" / "archive",
            guest="yes" if share.guest else "no",
            include=INCLUDED,
            hosts=" ".join(share.hosts_allow) or "ALL",
        )
        self._config.write_text(text, encoding="utf-8")


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
