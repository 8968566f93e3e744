"""What is mounted here, as the kernel tells it (proc_pid_mountinfo(5)). The file systems themselves aren't asked: one
that hangs would hold up who asks."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FILES: Final = "fuse.tandem"  # the kind that the share's files are
# Extended attributes of files there that aren't stored.
OPEN: Final = "user.tandem.open"  # how often it is open
UNWRITTEN: Final = "user.tandem.unwritten"  # whether its length was set, and its end never written: 1, or 0


@dataclass(frozen=True)
class Mount:
    number: int  # this mount has it, and no other one that there was
    device: str  # minor number: that of a FUSE connection
    kind: str
    writable: bool


def mount_at(folder: Path) -> Mount | None:
    """What is mounted on a folder, on top of all others; None if nothing is."""
    found = None
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split()
        if fields[4].decode("unicode_escape").encode("latin-1") != os.fsencode(folder):  # spaces are escaped
            continue
        rest = fields[fields.index(b"-") + 1 :]
        writable = b"rw" in fields[5].split(b",") and b"rw" in rest[2].split(b",")
        found = Mount(int(fields[0]), fields[2].partition(b":")[2].decode(), rest[0].decode(), writable)
    return found


def files_at(folder: Path) -> Mount | None:
    """The same, if it is the share's files."""
    found = mount_at(folder)
    return found if found is not None and found.kind == FILES else None
