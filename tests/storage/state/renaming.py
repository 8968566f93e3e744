"""renameat2(2), which Python has no call for."""

import ctypes
import os

AT_FDCWD = -100
NO_REPLACE = 1
EXCHANGE = 2

_libc = ctypes.CDLL(None, use_errno=True)


def renameat2(path: bytes, to: bytes, flags: int) -> None:
    if _libc.renameat2(AT_FDCWD, path, AT_FDCWD, to, flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
