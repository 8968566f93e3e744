"""smbd kept running beside the addresses, on a thread of its own: one that hangs holds up neither lease nor images."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final

import structlog

from conf.mounts import Mount
from ha.reach.samba import Samba

log = structlog.get_logger()

CHECK_S: Final = 1.0
RESTARTS_MAX: Final = 5  # within RESTARTS_S; more, and something is wrong here
RESTARTS_S: Final = 60.0
HANGS_S: Final = 20.0
END_S: Final = 10.0


class Share:
    def __init__(self, samba: Samba | None) -> None:
        """`samba` None: there is no share, and all this does nothing."""
        self._samba = samba
        self._worker = ThreadPoolExecutor(1, "share")
        self._job: Future[None] | None = None
        self._job_began = 0.0
        self._checked_at = 0.0
        self._restarts: list[float] = []
        self._files: Mount | None = None  # as they were shown when they were looked at last
        self._files_seen_at = time.monotonic()

    @property
    def up(self) -> bool:
        return self._samba is not None and self._samba.pid is not None

    @property
    def trouble(self) -> str:
        """Why it can't be relied on here, "" if it can."""
        now = time.monotonic()
        if self._job and not self._job.done() and now - self._job_began > HANGS_S:
            return "smbd hangs while it is started or stopped"
        if self._samba is not None and self._samba.wants_files and not self._sees_files(now):
            return "the share's files aren't mounted (tandem mount)"
        recent = [at for at in self._restarts if now - at < RESTARTS_S]
        return "smbd doesn't stay up" if len(recent) > RESTARTS_MAX else ""

    def start(self, patience_s: float) -> None:
        """Have it started, and wait for that so long at most."""
        if self._samba is None:
            return
        self._files = None  # whoever comes now comes to what is mounted now
        job = self._do(self._samba.start, "smbd.not_started")
        try:
            job.result(patience_s)
        except TimeoutError:
            log.warning("smbd.slow", waited_s=patience_s)

    def look_after(self) -> None:
        """Start it again if it has ended; doesn't wait."""
        now = time.monotonic()
        if self._samba is None or now - self._checked_at < CHECK_S or (self._job and not self._job.done()):
            return
        self._checked_at = now
        files, before = self._samba.files, self._files
        if files is not None and not files.writable:
            files = None  # nobody is let in yet
        self._files = files or before
        if self._samba.pid is None:
            self._restarts = [*self._restarts[-RESTARTS_MAX:], now]
            self._do(self._samba.start, "smbd.not_started")
        elif files is not None and before is not None and files.number != before.number:
            self._do(partial(self._let_go_of_files, self._samba, before), "smbd.files_kept")

    def _let_go_of_files(self, samba: Samba, before: Mount) -> None:
        try:
            samba.let_go_of_files()
        except BaseException:
            self._files = before  # once more
            raise

    def _sees_files(self, now: float) -> bool:
        if self._samba is not None and self._samba.files is not None:
            self._files_seen_at = now
        return now - self._files_seen_at < HANGS_S

    def stop(self) -> None:
        """Have it stopped; doesn't wait."""
        if self._samba is not None:
            self._do(self._samba.stop, "smbd.not_stopped")

    def close(self) -> None:
        """At the end of this process: wait for what was begun, within limits."""
        if self._job:
            try:
                self._job.result(END_S)
            except TimeoutError:
                log.error("smbd.hangs")
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _do(self, work: Callable[[], None], failed: str) -> Future[None]:
        """`failed`: what the log says if it does."""
        self._job, self._job_began = self._worker.submit(_carried_out, work, failed), time.monotonic()
        return self._job


def _carried_out(work: Callable[[], None], failed: str) -> None:
    try:
        work()
    except Exception as error:  # the share never takes the agent with it
        log.error(failed, error=str(error))
