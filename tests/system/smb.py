"""A client of the share over SMB, as PACS software is one: it checks itself, and connects again after any failure."""

import contextlib
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import smbclient

from tests.conftest import wait_for
from tools.lab.network import VIP, inside
from tools.lab.pair import Lab

USER, PASSWORD = "pacs", "correct horse"
ANSWER_S = 10.0
KEEPALIVE_S = 5
RECORD = 512
RECORDS = 200


def run(lab: Lab, member: str, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    argv, environment = lab.command(member, list(words))
    return subprocess.run(argv, env=environment, input=given, capture_output=True, text=True, timeout=120)


def have_user(lab: Lab, node: str) -> None:
    """Both nodes know USER. `node`: the primary."""
    done = run(lab, node, "tandem", "share", "user", "add", USER, given=f"{PASSWORD}\n" * 2)
    if "there is a user" not in done.stderr:
        assert done.returncode == 0, done.stderr


class Session:
    """One connection; to be used in the client's namespace. Raises OSError and smbprotocol's exceptions."""

    def __init__(self, share: str = "files", user: str = USER, password: str = PASSWORD) -> None:
        self.cache: dict[str, Any] = {}
        self.share = share
        smbclient.register_session(
            VIP, username=user, password=password, connection_timeout=ANSWER_S, connection_cache=self.cache
        )
        for connection in self.cache.values():  # as clients do: who waits for an answer asks whether anybody is there
            tcp = connection.transport._sock
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
                tcp.setsockopt(socket.IPPROTO_TCP, option, KEEPALIVE_S)

    def close(self) -> None:
        smbclient.reset_connection_cache(fail_on_error=False, connection_cache=self.cache)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def path(self, name: str) -> str:
        return rf"\\{VIP}\{self.share}\{name}"

    def open(self, name: str, mode: str) -> Any:
        """Unbuffered."""
        return smbclient.open_file(
            self.path(name), mode=mode, buffering=0, share_access="rwd", connection_cache=self.cache
        )

    def read(self, name: str) -> bytes:
        with smbclient.open_file(self.path(name), mode="rb", connection_cache=self.cache) as file:
            return bytes(file.read())

    def write(self, name: str, data: bytes) -> None:
        with smbclient.open_file(self.path(name), mode="wb", connection_cache=self.cache) as file:
            file.write(data)

    def rename(self, name: str, to: str) -> None:
        smbclient.rename(self.path(name), self.path(to), connection_cache=self.cache)

    def remove(self, name: str) -> None:
        smbclient.remove(self.path(name), connection_cache=self.cache)

    def mkdir(self, name: str) -> None:
        smbclient.makedirs(self.path(name), exist_ok=True, connection_cache=self.cache)

    def names(self, folder: str = "") -> set[str]:
        return set(smbclient.listdir(self.path(folder), connection_cache=self.cache))

    def stat(self, name: str) -> Any:
        return smbclient.stat(self.path(name), connection_cache=self.cache)


class SmbWriter:
    """Stores images as a PACS does (a name for the time being, write, close, rename), and appends to and changes
    records of a database that stays open; knows what it was told is done."""

    def __init__(self, folder: str, seed: int) -> None:
        self._folder, self._rng = folder, random.Random(seed)
        self.files: dict[str, bytes] = {}
        self.records: dict[int, bytes] = {}  # flushed
        self.maybe: dict[int, set[bytes]] = {}  # written and not flushed
        self.rounds = 0
        self.outage_s = 0.0  # the longest between two images that were stored
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator["SmbWriter"]:
        self._thread.start()
        try:
            self.wait_for_more()
            yield self
        finally:
            self._stop.set()
            self._thread.join(120)
        assert not self._thread.is_alive()

    def wait_for_more(self, rounds: int = 5, timeout_s: float = 120.0) -> None:
        until = self.rounds + rounds
        wait_for(lambda: self.rounds >= until, f"{rounds} more images over SMB", timeout_s)

    def _run(self) -> None:
        with inside("client"):
            while not self._stop.is_set():
                with contextlib.suppress(Exception), Session() as session:  # of whatever kind: it connects anew
                    session.mkdir(self._folder)
                    self._work(session)
                time.sleep(0.05)

    def _work(self, session: Session) -> None:
        last = time.monotonic() if self.rounds == 0 else self._last
        name = rf"{self._folder}\database"
        with session.open(name, "r+b" if "database" in session.names(self._folder) else "w+b") as database:
            while not self._stop.is_set():
                self._store(session)
                self._change(database)
                self.rounds += 1
                now = time.monotonic()
                self.outage_s, last = max(self.outage_s, now - last), now
                self._last = now

    def _store(self, session: Session) -> None:
        name = f"{self.rounds}-{self._rng.randrange(1 << 30)}.dcm"
        data = self._rng.randbytes(self._rng.choice((10, 9_000, 135_000)))
        session.write(rf"{self._folder}\~{name}", data)
        session.rename(rf"{self._folder}\~{name}", rf"{self._folder}\{name}")
        self.files[name] = data

    def _change(self, database: Any) -> None:
        written = {}
        for _ in range(3):
            at, record = self._rng.randrange(RECORDS), self._rng.randbytes(RECORD)
            self.maybe.setdefault(at, set()).add(record)
            database.seek(at * RECORD)
            database.write(record)
            written[at] = record
        database.fd.flush()
        self.records.update(written)
        for at in written:
            del self.maybe[at]

    def check(self) -> None:
        """Over SMB, as things are now."""
        with inside("client"), Session() as session:
            for name, data in self.files.items():
                assert session.read(rf"{self._folder}\{name}") == data, name
            found = session.read(rf"{self._folder}\database")
        for at, record in self.records.items():
            here = found[at * RECORD : (at + 1) * RECORD]
            assert here == record or here in self.maybe.get(at, ()), f"record {at}"
