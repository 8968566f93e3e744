"""Starts a lab node's processes and starts them again when they end: what systemd does on a real node.

    python -m tools.lab.supervise FOLDER

reads FOLDER/processes.json, {name: argv}, writes FOLDER/pids.json and FOLDER/log/NAME.log. On SIGTERM it ends them.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

POLL_S = 0.05
RESTART_S = 0.2
RESTART_S_MAX = 3.0
STOP_S = 10.0


class Supervisor:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._commands: dict[str, list[str]] = json.loads((folder / "processes.json").read_text())
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, float] = {}
        self._delay: dict[str, float] = {}
        self._due: dict[str, float] = dict.fromkeys(self._commands, 0.0)
        self._stopping = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def run(self) -> None:
        # `ip netns exec` has left a /sys without control groups, which a real node has.
        subprocess.run(["mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"], capture_output=True, check=False)
        while not self._stopping:
            for name in self._commands:
                self._look_after(name)
            time.sleep(POLL_S)
        for name in reversed(self._commands):
            process = self._running.get(name)
            if process and process.poll() is None:
                process.terminate()
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()

    def _look_after(self, name: str) -> None:
        now = time.monotonic()
        process = self._running.get(name)
        if process is not None:
            if process.poll() is None:
                return
            lived = now - self._started[name]
            delay = RESTART_S if lived > RESTART_S_MAX else min(RESTART_S_MAX, self._delay.get(name, RESTART_S) * 2)
            self._delay[name] = delay
            self._due[name] = now + delay
            del self._running[name]
        if now >= self._due[name]:
            with (self._folder / "log" / f"{name}.log").open("ab") as log:
                self._running[name] = subprocess.Popen(
                    self._commands[name], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder
                )
            self._started[name] = now
            self._write_pids()

    def _write_pids(self) -> None:
        pids = {name: process.pid for name, process in self._running.items()}
        temporary = self._folder / "pids.json.tmp"
        temporary.write_text(json.dumps(pids))
        temporary.rename(self._folder / "pids.json")


if __name__ == "__main__":
    os.setpgid(0, 0) if os.getpgrp() != os.getpid() else None
    Supervisor(Path(sys.argv[1])).run()
