"""A file of the share that is open, or being written to."""

import asyncio
from dataclasses import dataclass, field

from storage.files.copies import StoredFile


@dataclass
class OpenFile:
    """`size`, `mtime` and `ctime` are those of its bytes as they are now.

    `dirty`: it is marked so; `known`: its bytes are known to be what this writer makes of them, so that its flush may
    clear the mark. `changes`: how many are under way. `unflushed`: there are bytes that aren't flushed. `failed`: a
    sync of it failed; what it held then may be lost, and whoever flushes it hears of it.

    Of the copies: `lost`: this node's isn't what it should be, all goes to the other one's; `left` was this node's.
    `told`: the session in which the other node hears of every change; `alike`: in which its copy, of generation
    `peer_copy`, is the same as this one's once all that was told is carried out.
    """

    number: int
    size: int
    mtime: int
    ctime: int
    dirty: bool
    known: bool
    unflushed: bool = False
    lost: bool = False
    fresh: bool = False  # made just now
    handles: int = 0
    local: StoredFile | None = None
    left: list[StoredFile] = field(default_factory=list)
    changes: int = 0
    failed: bool = False
    told: int = 0
    alike: int = 0
    peer_copy: str = ""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # for what changes the fields above
    order: asyncio.Lock = field(default_factory=asyncio.Lock)  # both copies are changed in the same order
    bringing: asyncio.Lock = field(default_factory=asyncio.Lock)
