"""renameat2(2) with its errno as it is."""

import ctypes
import os

from storage.objects.local_files import AT_FDCWD, libc


def renameat2(path: bytes, to: bytes, flags: int) -> None:
    if libc.renameat2(AT_FDCWD, path, AT_FDCWD, to, flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
