"""The rows of the share's names and attributes, and what can be read of them.

file_inodes    number -> Inode
file_names     folder, name -> number, position
file_listing   folder, position -> number, name     the order in which a folder is listed; a name keeps its position
file_folded    folder, digest of the name without case, position -> nothing
file_xattrs    number, name -> value
file_orphans   number -> nothing                    without a name, and open
file_dirty     number -> nothing                    its bytes may be others than those that were flushed last
file_lacking   number, node -> nothing              it doesn't hold what was flushed last
file_copies    number, node -> generation           of its copy, where that was made again
file_counters  "next" -> the next inode number or position, "space" -> the name of the numbers, "user" -> the next
               user's number
file_users     name -> User
"""

import errno
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NoReturn

import xxhash

from storage.state.file_model import ROOT, Inode, User, decode_inode, decode_user
from storage.state.kv import KeyValues

TABLES: Final = (
    "file_inodes",
    "file_names",
    "file_listing",
    "file_folded",
    "file_xattrs",
    "file_orphans",
    "file_dirty",
    "file_lacking",
    "file_copies",
    "file_counters",
    "file_users",
)
NAME_BYTES_MAX: Final = 255
FIRST: Final = 16  # the first inode number or position that is given
NUMBER_BYTES: Final = 8
# Times with a fraction of a second: by the topmost folder smbd tells whether it may give files such times.
_ROOT: Final = Inode(mode=stat.S_IFDIR | 0o755, uid=0, gid=0, nlink=2, size=0, atime=1, mtime=1, ctime=1, parent=ROOT)
_MEANINGS: Final = {
    errno.EEXIST: "there is one of that name",
    errno.EINVAL: "a folder can't be moved into itself, or the name can't be",
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "the name is longer than 255 bytes",
    errno.ENODATA: "it has no such attribute",
    errno.ENOENT: "there is none of that name",
    errno.ENOSPC: "its attributes have no room",
    errno.ENOTDIR: "it isn't a folder",
    errno.ENOTEMPTY: "the folder isn't empty",
    errno.EPERM: "a folder has one name",
}


@dataclass(frozen=True)
class Named:
    """A name in a folder. `position` is where it is listed."""

    inode: int
    position: int
    name: bytes


class FileRefused(OSError):
    """A change that POSIX doesn't allow, with the errno that the system call has for it. Nothing was changed."""


def refuse(code: int) -> NoReturn:
    raise FileRefused(code, _MEANINGS[code])


def number_key(number: int) -> bytes:
    return number.to_bytes(NUMBER_BYTES, "big")


def number_of(raw: bytes) -> int:
    return int.from_bytes(raw, "big")


def inode(txn: KeyValues, number: int) -> Inode:
    """Raises FileRefused (ENOENT)."""
    raw = txn.get("file_inodes", number_key(number))
    if raw is not None:
        return decode_inode(raw)
    return _ROOT if number == ROOT else refuse(errno.ENOENT)


def is_gone(txn: KeyValues, number: int) -> bool:
    return number != ROOT and txn.get("file_inodes", number_key(number)) is None


def folder(txn: KeyValues, number: int) -> Inode:
    """Raises FileRefused (ENOENT, ENOTDIR)."""
    found = inode(txn, number)
    return found if stat.S_ISDIR(found.mode) else refuse(errno.ENOTDIR)


def find(txn: KeyValues, parent: int, name: bytes) -> Named | None:
    raw = txn.get("file_names", number_key(parent) + name)
    if raw is None:
        return None
    return Named(number_of(raw[:NUMBER_BYTES]), number_of(raw[NUMBER_BYTES:]), name)


def lookup(txn: KeyValues, parent: int, name: bytes) -> Named:
    """Raises FileRefused (ENOENT, ENOTDIR, ENAMETOOLONG)."""
    folder(txn, parent)
    if len(name) > NAME_BYTES_MAX:
        refuse(errno.ENAMETOOLONG)
    return find(txn, parent, name) or refuse(errno.ENOENT)


def listed(txn: KeyValues, parent: int, after: int = 0) -> Iterator[Named]:
    """The names in a folder behind a position, in the order of their positions."""
    prefix = number_key(parent)
    for key, value in txn.scan("file_listing", prefix + number_key(after + 1)):
        if not key.startswith(prefix):
            return
        yield Named(number_of(value[:NUMBER_BYTES]), number_of(key[NUMBER_BYTES:]), value[NUMBER_BYTES:])


def is_empty(txn: KeyValues, parent: int) -> bool:
    return next(listed(txn, parent), None) is None


def real_name(txn: KeyValues, parent: int, name: bytes) -> bytes | None:
    """How a name is written there, whatever the case it is asked for in; None if there is none."""
    if find(txn, parent, name):
        return name
    folded = fold(name)
    prefix = number_key(parent) + digest_of(folded)
    for key, _ in txn.scan("file_folded", prefix):
        if not key.startswith(prefix):
            return None
        row = txn.get("file_listing", number_key(parent) + key[len(prefix) :])
        if row is not None and fold(row[NUMBER_BYTES:]) == folded:
            return row[NUMBER_BYTES:]
    return None


def xattr(txn: KeyValues, number: int, name: bytes) -> bytes:
    """Raises FileRefused (ENODATA)."""
    value = txn.get("file_xattrs", number_key(number) + name)
    return refuse(errno.ENODATA) if value is None else value


def has_xattr(txn: KeyValues, number: int, name: bytes, value: bytes) -> bool:
    return txn.get("file_xattrs", number_key(number) + name) == value


def xattr_names(txn: KeyValues, number: int) -> list[bytes]:
    return [key[NUMBER_BYTES:] for key, _ in of_file(txn, "file_xattrs", number)]


def is_dirty(txn: KeyValues, number: int) -> bool:
    return txn.get("file_dirty", number_key(number)) is not None


def dirty(txn: KeyValues) -> list[int]:
    """Files whose bytes may be others than those that were flushed last."""
    return [number_of(key) for key, _ in txn.scan("file_dirty")]


def lacking(txn: KeyValues, number: int) -> tuple[str, ...]:
    """The nodes that don't hold what was flushed last of a file."""
    return tuple(key[NUMBER_BYTES:].decode() for key, _ in of_file(txn, "file_lacking", number))


def all_lacking(txn: KeyValues, after: int = 0) -> Iterator[tuple[int, str]]:
    """(inode number, node that lacks it), of the numbers behind one."""
    for key, _ in txn.scan("file_lacking", number_key(after + 1)):
        yield number_of(key[:NUMBER_BYTES]), key[NUMBER_BYTES:].decode()


def generation(txn: KeyValues, number: int, node: str) -> str:
    """Of a node's copy of a file, "" for the first one. What has another is none, and can go."""
    return (txn.get("file_copies", number_key(number) + node.encode()) or b"").decode()


def generations(txn: KeyValues, number: int) -> tuple[str, ...]:
    """All that nodes have of a file now."""
    return tuple(value.decode() for _, value in of_file(txn, "file_copies", number))


def of_file(txn: KeyValues, table: str, number: int) -> list[tuple[bytes, bytes]]:
    """The rows of a table whose keys begin with an inode number."""
    prefix, found = number_key(number), []
    for key, value in txn.scan(table, prefix):
        if not key.startswith(prefix):
            break
        found.append((key, value))
    return found


def next_number(txn: KeyValues) -> int:
    """The next inode number, or position, that is given."""
    raw = txn.get("file_counters", b"next")
    return number_of(raw) if raw is not None else FIRST


def space(txn: KeyValues) -> str:
    """The name of the inode numbers, "" before there was a writer."""
    return (txn.get("file_counters", b"space") or b"").decode()


def users(txn: KeyValues) -> dict[str, User]:
    """All of the share's users, by name."""
    return {key.decode(): decode_user(value) for key, value in txn.scan("file_users")}


def next_user(txn: KeyValues) -> int:
    """The number that the next user gets."""
    return number_of(txn.get("file_counters", b"user") or b"")


def orphans(txn: KeyValues) -> list[int]:
    """Inodes without a name. When a node begins to lead nobody has them open any more."""
    return [number_of(key) for key, _ in txn.scan("file_orphans")]


def fold(name: bytes) -> str:
    """A name without regard to case, letter by letter, as Windows compares names."""
    text = name.decode("utf-8", "surrogateescape")
    return "".join(upper if len(upper := letter.upper()) == 1 else letter for letter in text)


def folded_key(parent: int, named: Named) -> bytes:
    return number_key(parent) + digest_of(fold(named.name)) + number_key(named.position)


def digest_of(folded: str) -> bytes:
    return xxhash.xxh3_64_digest(folded.encode("utf-8", "surrogateescape"))


def is_below(txn: KeyValues, number: int, above: int) -> bool:
    """A folder is another, or somewhere in it."""
    while number not in (above, ROOT):
        number = inode(txn, number).parent
    return number == above
