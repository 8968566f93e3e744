"""Who may log in: names and passcodes against what the settings keep of them.

A check costs some 50 ms by design. It is done in a thread, one at a time, whether or not the name is known; one that
fails is answered late, and when too many wait the next is turned down without a look.
"""

import asyncio
import hashlib
import hmac
import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

REMEMBERED_MAX: Final = 256
WAITING_MAX: Final = 16
FAILED_PAUSE_S: Final = 1.0


class Overrun(Exception):
    """Too many log in at once; try again later."""


def hash_password(password: bytes, salt: bytes) -> str:
    """What stands in the settings for a password: scrypt (RFC 7914) with N = 2^14, r = 8, p = 1."""
    return f"scrypt${salt.hex()}${hashlib.scrypt(password, salt=salt, n=1 << 14, r=8, p=1).hex()}"


def is_password(password: bytes, kept: str) -> bool:
    """`kept` is from `hash_password`; anything else matches nothing. Costs some 50 ms."""
    method, _, rest = kept.partition("$")
    salt, _, _ = rest.partition("$")
    try:
        return method == "scrypt" and hmac.compare_digest(hash_password(password, bytes.fromhex(salt)), kept)
    except ValueError:
        return False


class Users:
    def __init__(self, users: Mapping[str, str]) -> None:
        """`users`: name -> `hash_password`."""
        self._users = dict(users)
        self._nobody = hash_password(os.urandom(16), os.urandom(16)) if users else ""
        self._key = os.urandom(32)
        self._known: OrderedDict[bytes, None] = OrderedDict()  # keyed hashes of what was right before
        self._turn = asyncio.Semaphore(1)
        self._waiting = 0

    @property
    def wanted(self) -> bool:
        """Only who is known may come in."""
        return bool(self._users)

    async def may_log_in(self, name: str, password: bytes) -> bool:
        """Raises Overrun."""
        kept = self._users.get(name, self._nobody)
        mark = hmac.digest(self._key, f"{name}\0{kept}\0".encode() + password, "sha256")
        if mark in self._known:
            self._known.move_to_end(mark)
            return True
        if self._waiting >= WAITING_MAX:
            raise Overrun
        self._waiting += 1
        try:
            async with self._turn:
                good = await asyncio.to_thread(is_password, password, kept) and name in self._users
            if not good:
                await asyncio.sleep(FAILED_PAUSE_S)
        finally:
            self._waiting -= 1
        if good:
            self._known[mark] = None
            if len(self._known) > REMEMBERED_MAX:
                self._known.popitem(last=False)
        return good
