"""What follows the address: programs that run where the primary is, after address and files are there.

A thread of its own starts them in their order and stops them in the opposite one, so that none that hangs holds up the
lease. Who has lost the right to serve doesn't wait for them: they are killed, and what they write to the share's files
isn't taken any more anyway.
"""

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from conf.mounts import Mount
from conf.settings import FollowSettings
from ha.reach.followed import Program, ProgramOf, is_well

log = structlog.get_logger()

LOOK_S: Final = 0.5
COUNTED_S: Final = 600.0  # failures that are older don't count
AGAIN_S: Final = 30.0  # between two tries of one that has failed too often
SETTLES_S: Final = 1.0  # what has no check is well if it still runs after this
LOOK_AGAIN_S: Final = 5.0
STEP_S: Final = 0.1
FAILURES = (OSError, subprocess.SubprocessError)


@dataclass
class Followed:
    settings: FollowSettings
    program: Program
    state: str = "stopped"
    why: str = ""  # it isn't well
    failures: list[float] = field(default_factory=list)  # when
    checked_at: float = 0.0
    tried_at: float = float("-inf")
    looked_at: float = float("-inf")  # whether it is really down
    down: bool = False  # for certain

    @property
    def failed_for_good(self) -> bool:
        """More often than it may."""
        allowed = 0 if self.settings.on_failure == "hand-over" else self.settings.restarts
        now = time.monotonic()
        return sum(now - at < COUNTED_S for at in self.failures) > allowed


class Following:
    def __init__(
        self, follow: Sequence[FollowSettings], program_of: ProgramOf, files: Callable[[], Mount | None]
    ) -> None:
        """`files()`: where the share's files are shown, None if they aren't."""
        self._all = [Followed(settings, program_of(settings)) for settings in follow]
        self._files = files
        self._mount = 0  # number of the mount that they were started with
        self._wanted = self._gently = False
        self._decided = False  # what an agent before this one started runs on until it is known what is wanted
        self._changed = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="following", daemon=True)
        if self._all:
            self._thread.start()

    @property
    def stop_s(self) -> float:
        """How long stopping all of them may take."""
        return sum(one.settings.stop_s for one in self._all)

    @property
    def down(self) -> bool:
        """None of them runs, for certain."""
        return not self._all or (not self._wanted and all(one.down for one in self._all))

    @property
    def states(self) -> dict[str, str]:
        """By name: stopped, starting, running, stopping, or failing and why."""
        return {one.settings.name: f"failing: {one.why}" if one.state == "failing" else one.state for one in self._all}

    @property
    def trouble(self) -> str:
        """Why the other node had better have the address, "" if nothing."""
        bad = [one for one in self._all if one.settings.on_failure != "alert" and one.failed_for_good]
        return f"{bad[0].settings.name} {bad[0].why or 'keeps failing'}" if bad else ""

    def want(self, up: bool, *, gently: bool = True) -> None:
        """Have them run, or not; doesn't wait. Not `gently`: killed at once."""
        if (up, gently) != (self._wanted, self._gently) or not self._decided:
            self._wanted, self._gently, self._decided = up, gently, True
            self._changed.set()

    def close(self, patience_s: float) -> None:
        """Stop them, killed after `patience_s`; at the end of this process."""
        if not self._all:
            return
        self.want(False)
        deadline = time.monotonic() + patience_s
        while not self.down and time.monotonic() < deadline:
            time.sleep(STEP_S)
        self.want(False, gently=False)
        self._ended = True
        self._changed.set()
        self._thread.join(patience_s)
        for one in self._all:  # whatever the thread hangs at
            with contextlib.suppress(*FAILURES):
                if one.program.runs:
                    one.program.kill()

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._changed.clear()
            try:
                if self._decided:
                    self._turn()
            except Exception:  # whatever it is, the next turn looks anew
                log.exception("follow.failed")
            if self._ended:
                return
            self._changed.wait(LOOK_S)

    def _turn(self) -> None:
        if not self._wanted:
            for one in reversed(self._all):
                self._take_down(one)
            self._mount = 0
            return
        mount = self._files()
        there = mount is not None and mount.writable
        if mount is not None and there:
            if self._mount not in (0, mount.number):  # all they had open there is lost
                log.warning("follow.files_anew")
                for one in reversed(self._all):
                    if one.settings.files:
                        self._take_down(one)
            self._mount = mount.number
        for one in self._all:
            if one.settings.files and not there:
                return
            if not (self._wanted and self._keep(one)):
                return  # those after it may need it

    def _keep(self, one: Followed) -> bool:
        """Have it run; whether those after it may be started."""
        now = time.monotonic()
        try:
            runs = one.program.serves if one.state == "running" else one.program.runs
            if one.state == "running" and runs and now - one.checked_at >= one.settings.check_every_s:
                one.checked_at = now
                if not is_well(one.settings, self._goes_on):
                    if not self._wanted:
                        return False
                    self._failed(one, "isn't well by its check")
                    self._end(one)
                    runs = False
            if one.state == "running" and not runs:
                if not one.why:
                    self._failed(one, "has ended")
                one.state = "failing"
            if one.state == "running":
                return True
            if one.failed_for_good and (one.settings.on_failure == "alert" or now - one.tried_at < AGAIN_S):
                one.state = "failing"
                return one.settings.on_failure == "alert"
            return self._start(one)
        except FAILURES as error:
            self._failed(one, f"can't be started: {error}")
            one.state = "failing"
            return False

    def _start(self, one: Followed) -> bool:
        one.tried_at = time.monotonic()
        adopted = one.program.runs and one.state == "stopped" and not one.down  # an agent before this one started it
        one.down = False
        if not adopted and one.program.runs:  # what is left of it, or isn't well
            self._end(one)
        one.state = "starting"
        if not adopted:
            one.program.start()
        deadline = one.tried_at + one.settings.start_s
        while self._wanted:
            if not one.program.serves:
                self._failed(one, "ended when it was started")
                one.state = "failing"
                return False
            settled = bool(one.settings.check) or adopted or time.monotonic() - one.tried_at > SETTLES_S
            if settled and is_well(one.settings, self._goes_on):
                one.state, one.why, one.checked_at = "running", "", time.monotonic()
                log.info("follow.runs", name=one.settings.name, seconds=round(one.checked_at - one.tried_at, 1))
                return True
            if time.monotonic() > deadline:
                self._failed(one, "isn't well in time")
                self._end(one)
                one.state = "failing"
                return False
            time.sleep(STEP_S)
        return False

    def _goes_on(self) -> bool:
        return self._wanted

    def _failed(self, one: Followed, why: str) -> None:
        one.failures = [*one.failures, time.monotonic()][-one.settings.restarts - 1 :]
        one.why = why
        log.error("follow.fails", name=one.settings.name, why=why)

    def _take_down(self, one: Followed) -> None:
        now, was = time.monotonic(), one.state
        if one.down and now - one.looked_at < LOOK_AGAIN_S:  # somebody else may have started it
            return
        one.looked_at = now
        try:
            if one.program.runs:
                one.down = False
                self._end(one)
            one.program.tidy()
            one.state, one.down = "stopped", True
        except FAILURES as error:
            one.state = "stopping"
            log.error("follow.not_stopped", name=one.settings.name, error=str(error))
        if was != "stopped" and one.down:
            log.info("follow.stopped", name=one.settings.name)

    def _end(self, one: Followed) -> None:
        """It is gone when this returns. Raises OSError or subprocess.SubprocessError."""
        one.state = "stopping"
        if self._gently or self._wanted:
            try:
                one.program.stop()
            except FAILURES as error:
                log.error("follow.not_asked_to_stop", name=one.settings.name, error=str(error))
        deadline = time.monotonic() + one.settings.stop_s
        while one.program.runs:
            if time.monotonic() > deadline or not (self._gently or self._wanted):
                log.warning("follow.killed", name=one.settings.name)
                one.program.kill()
                deadline = time.monotonic() + one.settings.stop_s
            time.sleep(STEP_S)
