"""One thing that runs where the primary is: a systemd unit, or a program that is started here.

A program has a control group of its own (cgroups(7), version 2), and with it all that it starts: so a restarted agent
finds it again, nobody else can seem to be it, and nothing of it is left behind when it is to go.
"""

import contextlib
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import structlog

from conf.settings import FollowSettings

log = structlog.get_logger()

SYSTEMDS: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")  # for the agent alone
WAITING: Final = 'read -r _; exec "$@" < /dev/null'  # until it is where it belongs
STEP_S: Final = 0.05
SYSTEMCTL_S: Final = 10.0  # more than it ever needs only to say how a unit is


class Program(Protocol):
    """Calls don't wait for what they ask for. All raise OSError or subprocess.SubprocessError."""

    @property
    def runs(self) -> bool:
        """Some of it is there."""
        ...

    @property
    def serves(self) -> bool:
        """What was started is there, and not only something that it has left behind."""
        ...

    def start(self) -> None: ...
    def stop(self) -> None:
        """Ask it to end."""
        ...

    def kill(self) -> None:
        """All of it, at once."""
        ...

    def tidy(self) -> None:
        """It is gone for good."""
        ...


class Unit:
    """A unit of systemd's, which isn't to be enabled there."""

    def __init__(self, unit: str) -> None:
        self._unit = unit

    @property
    def runs(self) -> bool:
        command = ["systemctl", "show", "--property=ActiveState", "--property=Job", self._unit]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SYSTEMCTL_S, check=True)
        shown = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        waits = shown.get("Job", "") not in ("", "0")  # for another unit, before it is started
        return waits or shown.get("ActiveState") not in ("inactive", "failed")

    @property
    def serves(self) -> bool:
        return self.runs

    def start(self) -> None:
        self._systemctl("reset-failed")
        self._systemctl("start")

    def stop(self) -> None:
        self._systemctl("stop")

    def kill(self) -> None:
        command = ["systemctl", "kill", "--kill-who=all", "--signal=SIGKILL", self._unit]
        subprocess.run(command, capture_output=True, timeout=SYSTEMCTL_S, check=False)  # it may be gone
        self._systemctl("stop")

    def tidy(self) -> None:
        pass

    def _systemctl(self, what: str) -> None:
        command = ["systemctl", *(["--no-block"] if what != "reset-failed" else []), what, self._unit]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SYSTEMCTL_S, check=False)
        if done.returncode and what != "reset-failed":
            raise OSError(0, done.stderr.strip() or f"systemctl {what} {self._unit} failed")


class Command:
    """A program that stays in the foreground. What it writes goes to a file of its own."""

    def __init__(self, settings: FollowSettings, mark: str, output: Path) -> None:
        """`mark`: says whose it is, and is no other's on this machine."""
        self._settings, self._output, self._mark = settings, output, mark
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        return bool(self._pids())

    @property
    def serves(self) -> bool:
        return self._process.poll() is None if self._process is not None else self.runs

    def start(self) -> None:
        group = self._group()
        group.mkdir(exist_ok=True)
        self._output.parent.mkdir(parents=True, exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if name not in SYSTEMDS}
        user = self._user()
        about = {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name} if user else {}
        with self._output.open("ab") as output:
            process = subprocess.Popen(
                ["/bin/sh", "-c", WAITING, self._settings.name, *self._settings.start],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**inherited, **about},
                user=user.pw_uid if user else None,
                group=user.pw_gid if user else None,
                extra_groups=os.getgrouplist(user.pw_name, user.pw_gid) if user else None,
            )
        self._process = process
        assert process.stdin is not None
        try:
            (group / "cgroup.procs").write_text(str(process.pid))  # before it does anything
            with contextlib.suppress(OSError):  # unlike the agent, it isn't to be spared when memory runs out
                Path(f"/proc/{process.pid}/oom_score_adj").write_text("0")
            process.stdin.write(b"\n")
            process.stdin.close()
        except OSError:
            process.kill()
            process.wait()
            raise

    def _user(self) -> pwd.struct_passwd | None:
        try:
            return pwd.getpwnam(self._settings.user) if self._settings.user else None
        except KeyError:
            raise OSError(0, f"there is no user {self._settings.user}") from None

    def stop(self) -> None:
        if self._settings.stop:
            quiet = subprocess.DEVNULL
            self._stopping = subprocess.Popen(self._settings.stop, stdin=quiet, stdout=quiet, stderr=quiet)
            return
        pids = self._pids()
        leader = self._process.pid if self._process is not None else 0  # it tells its own
        self._signal(signal.SIGTERM, [leader] if leader in pids else pids)

    def kill(self) -> None:
        if self._stopping is not None and self._stopping.poll() is None:
            self._stopping.kill()
            self._stopping.wait()
        try:
            (self._group() / "cgroup.kill").write_text("1")
        except OSError:  # there is no group, or the kernel is an old one
            self._signal(signal.SIGKILL, self._pids())

    def tidy(self) -> None:
        with contextlib.suppress(OSError):
            self._group().rmdir()

    def _signal(self, number: int, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _pids(self) -> list[int]:
        for one in (self._process, self._stopping):
            if one is not None:
                one.poll()  # one that has ended is none
        try:
            return [int(line) for line in (self._group() / "cgroup.procs").read_text().split()]
        except FileNotFoundError:
            return []

    def _group(self) -> Path:
        """Raises OSError where there are none of version 2."""
        return own_group() / f"tandem-follows-{self._mark.replace('/', '-')}"


def own_group() -> Path:
    """The control group of this process. Raises OSError."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == "cgroup2":
            for group in Path("/proc/self/cgroup").read_text().splitlines():
                if group.startswith("0::"):
                    return Path(before.split()[4] + group.removeprefix("0::").rstrip("/"))
    raise OSError(0, "no control groups of version 2 are mounted here")


def is_well(settings: FollowSettings, goes_on: Callable[[], bool]) -> bool:
    """By its own check, where there is one. One that doesn't end, or can't be run, says that it isn't; so does one that
    is given up since it doesn't go on."""
    if not settings.check:
        return True
    quiet = subprocess.DEVNULL
    try:
        check = subprocess.Popen(settings.check, stdin=quiet, stdout=quiet, stderr=quiet)
    except OSError as error:
        log.error("follow.no_check", name=settings.name, error=str(error))
        return False
    deadline = time.monotonic() + settings.check_s
    while check.poll() is None:
        if time.monotonic() > deadline or not goes_on():
            check.kill()
            check.wait()
            return False
        time.sleep(STEP_S)
    return check.returncode == 0


ProgramOf = Callable[[FollowSettings], Program]
