"""Somebody who asks a service again and again, and when it answered: how long it was away is the longest gap."""

import contextlib
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Final

POLL_S: Final = 0.02


class Probe:
    """Calls `attempt` in a thread until it leaves the context; what it returns is how many answers came by then.

    `attempt(answered, stopped)` calls `answered()` for each answer and returns when it fails or when `stopped()`.
    """

    def __init__(
        self,
        attempt: Callable[[Callable[[], None], Callable[[], bool]], None],
        *,
        pause_s: float = 0.0,
        place: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """`place`: a context that the thread works in, another network for instance."""
        self._attempt, self._pause_s, self._place = attempt, pause_s, place
        self.answers: list[float] = []  # time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Probe":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with self._place():
            while not self._stop.wait(self._pause_s):
                self._attempt(self._answered, self._stop.is_set)

    def _answered(self) -> None:
        self.answers.append(time.monotonic())

    def wait_for_more(self, count: int, timeout_s: float) -> None:
        """Raises TimeoutError."""
        target, deadline = len(self.answers) + count, time.monotonic() + timeout_s
        while len(self.answers) < target:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {count} answers within {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def longest_gap_s(self, since: float) -> float:
        """Seconds between two answers, the longest that ended after `since`; one that lasts ends now."""
        times = [*self.answers, time.monotonic()]
        return max((after - before for before, after in pairwise(times) if after > since), default=float("inf"))
