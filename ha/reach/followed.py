"""One thing that runs where the primary is: a systemd unit, or a program that is started here.

What a program starts is found by a mark in its environment (proc_pid_environ(5)), so that a restarted agent finds it
again, and nothing of it is left behind when it is to go, whatever sessions it has made.
"""

import contextlib
import os
import pwd
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import structlog

from conf.settings import FollowSettings

log = structlog.get_logger()

MARK: Final = "TANDEM_FOLLOWS"
SYSTEMDS: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")  # for the agent alone
SYSTEMCTL_S: Final = 10.0  # more than it ever needs only to say how a unit is


class Program(Protocol):
    """Calls may block for as long as they are allowed to. All raise OSError or subprocess.SubprocessError."""

    @property
    def runs(self) -> bool:
        """Some of it is there."""
        ...

    def start(self) -> None:
        """Doesn't wait until it is of use."""
        ...

    def stop(self) -> None:
        """Ask it to end; doesn't wait for that."""
        ...

    def kill(self) -> None:
        """All of it, at once."""
        ...


class Unit:
    """A unit of systemd's, which isn't to be enabled there."""

    def __init__(self, unit: str) -> None:
        self._unit = unit

    @property
    def runs(self) -> bool:
        command = ["systemctl", "show", "--property=ActiveState", "--value", self._unit]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SYSTEMCTL_S, check=True)
        return done.stdout.strip() not in ("inactive", "failed")

    def start(self) -> None:
        self._systemctl("reset-failed")
        self._systemctl("start")

    def stop(self) -> None:
        self._systemctl("stop")

    def kill(self) -> None:
        command = ["systemctl", "kill", "--kill-who=all", "--signal=SIGKILL", self._unit]
        subprocess.run(command, capture_output=True, timeout=SYSTEMCTL_S, check=True)
        self._systemctl("stop")

    def _systemctl(self, what: str) -> None:
        command = ["systemctl", *(["--no-block"] if what != "reset-failed" else []), what, self._unit]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SYSTEMCTL_S, check=False)
        if done.returncode and what != "reset-failed":
            raise OSError(0, done.stderr.strip() or f"systemctl {what} {self._unit} failed")


class Command:
    """A program that stays in the foreground. What it writes goes to a file of its own."""

    def __init__(self, settings: FollowSettings, mark: str, output: Path) -> None:
        """`mark`: says whose it is, and is no other's on this machine."""
        self._settings, self._output = settings, output
        self._mark = f"{MARK}={mark}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        if self._process is not None and self._process.poll() is None:
            return True
        return bool(self._pids())

    def start(self) -> None:
        name, _, value = self._mark.partition("=")
        self._output.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        inherited = {name: value for name, value in os.environ.items() if name not in SYSTEMDS}
        user = pwd.getpwnam(self._settings.user) if self._settings.user else None
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                list(self._settings.start),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**inherited, name: value, **({"HOME": user.pw_dir, "USER": user.pw_name} if user else {})},
                user=user.pw_uid if user else None,
                group=user.pw_gid if user else None,
                extra_groups=os.getgrouplist(user.pw_name, user.pw_gid) if user else None,
            )

        with contextlib.suppress(OSError):  # unlike the agent, it isn't to be spared when memory runs out
            Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("0")

    def stop(self) -> None:
        if self._settings.stop:
            subprocess.run(self._settings.stop, capture_output=True, timeout=self._settings.stop_s, check=False)
            return
        pids = self._pids()
        leader = self._process.pid if self._process is not None else 0  # it tells its own
        self._signal(signal.SIGTERM, [leader] if leader in pids else pids)

    def kill(self) -> None:
        self._signal(signal.SIGKILL, self._pids())

    def _signal(self, number: int, pids: list[int]) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def _pids(self) -> list[int]:
        if self._process is not None:
            self._process.poll()  # one that has ended is none
        wanted, found = self._mark.encode(), []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
        return found


def is_well(settings: FollowSettings) -> bool:
    """By its own check, where there is one. A check that doesn't end says that it isn't."""
    if not settings.check:
        return True
    try:
        done = subprocess.run(settings.check, capture_output=True, timeout=settings.check_s, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


ProgramOf = Callable[[FollowSettings], Program]
