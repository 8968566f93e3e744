"""Names and attributes of the share's files: a state machine on the log, with the rules of POSIX.

What changes them is decided by `apply` alone, from the rows and the change, so two nodes that apply the same log have
the same rows. What it refuses, it refuses before it has changed anything. Who may do what, the kernel asks before.

Invariants of the rows (`file_rows`), checked by `file_soundness`: each row of `file_names` has one in `file_listing`
and one in `file_folded`, and the other way round; `nlink` of a file is the number of its names, of a folder 2 and one
for each folder in it; a folder has one name, and its way up ends at the root; an inode without a name is an orphan, and
no other is.
"""

import errno
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from storage.state.file_model import (
    ROOT,
    BeginWriting,
    Change,
    Drop,
    Flush,
    Held,
    Inode,
    Lacks,
    Link,
    Make,
    MarkDirty,
    Remove,
    RemoveUser,
    RemoveXattr,
    Rename,
    SetAttributes,
    SetUser,
    SetXattr,
    User,
    decode_user,
    encode,
)
from storage.state.file_rows import (
    NAME_BYTES_MAX,
    Named,
    find,
    folded_key,
    folder,
    generations,
    inode,
    is_below,
    is_empty,
    lacking,
    lookup,
    next_number,
    next_user,
    number_key,
    of_file,
    refuse,
    xattr_names,
)
from storage.state.kv import KeyValues

PERMISSIONS: Final = 0o7777
NUMBERS_SKIPPED: Final = 1 << 20  # more than a writer may have on their way
XATTR_NAMES_BYTES_MAX: Final = 64 << 10  # of one inode: what listxattr(2) can give


@dataclass(frozen=True)
class Applied:
    """`inode`: what the change was about. `gone`: a file that is no more, each of its copies by number and generation;
    their bytes can go. `replaced`: what a name was taken from for it, or exchanged with."""

    inode: int
    gone: tuple[tuple[int, str], ...] = ()
    replaced: int = 0


def apply(txn: KeyValues, change: Change) -> Applied:
    """Carry a change out. Raises FileRefused as the system call would; then nothing was changed."""
    return CARRIED_OUT[type(change)](txn, change)


def _make(txn: KeyValues, change: Make) -> Applied:
    parent = _free_place(txn, change.parent, change.name)
    mode, gid, is_folder = change.mode, change.gid, stat.S_ISDIR(change.mode)
    if parent.mode & stat.S_ISGID:  # inode(7): what is made there belongs to the folder's group
        gid = parent.gid
        mode |= stat.S_ISGID if is_folder else 0
    number = _next(txn)
    made = Inode(
        mode=mode,
        uid=change.uid,
        gid=gid,
        nlink=2 if is_folder else 1,
        size=len(change.target),
        atime=change.at,
        mtime=change.at,
        ctime=change.at,
        rdev=change.rdev,
        parent=change.parent,
        target=change.target,
    )
    _put(txn, number, made)
    if change.dirty:
        txn.put("file_dirty", number_key(number), b"")
    _add_name(txn, change.parent, Named(number, number, change.name))
    _touch(txn, change.parent, change.at, links=is_folder)
    return Applied(number)


def _link(txn: KeyValues, change: Link) -> Applied:
    linked = inode(txn, change.inode)
    _free_place(txn, change.parent, change.name)
    if stat.S_ISDIR(linked.mode):
        refuse(errno.EPERM)
    if not linked.nlink:
        refuse(errno.ENOENT)
    _put(
        txn,
        change.inode,
        msgspec.structs.replace(linked, nlink=linked.nlink + 1, ctime=change.at, parent=change.parent),
    )
    _add_name(txn, change.parent, Named(change.inode, _next(txn), change.name))
    _touch(txn, change.parent, change.at)
    return Applied(change.inode)


def _remove(txn: KeyValues, change: Remove) -> Applied:
    named = lookup(txn, change.parent, change.name)
    is_folder = stat.S_ISDIR(inode(txn, named.inode).mode)
    if change.folder:
        if not is_folder:
            refuse(errno.ENOTDIR)
        if not is_empty(txn, named.inode):
            refuse(errno.ENOTEMPTY)
    elif is_folder:
        refuse(errno.EISDIR)
    _take_name(txn, change.parent, named)
    gone = _unlinked(txn, named.inode, change.at, held=change.held)
    _touch(txn, change.parent, change.at, links=-1 if is_folder else 0)
    return Applied(named.inode, gone)


def _rename(txn: KeyValues, change: Rename) -> Applied:
    named = lookup(txn, change.parent, change.name)
    _check_name(change.to_name)
    folder(txn, change.to_parent)
    target = find(txn, change.to_parent, change.to_name)
    moved = inode(txn, named.inode)
    if change.exchange and (change.no_replace or target is None):
        refuse(errno.EINVAL if change.no_replace else errno.ENOENT)
    if change.no_replace and target is not None:
        refuse(errno.EEXIST)
    _not_below(txn, named.inode, moved, change.to_parent)
    if target is None:
        _move(txn, change, named, moved)
        return Applied(named.inode)
    there = inode(txn, target.inode)
    if change.exchange:
        _not_below(txn, target.inode, there, change.parent)
        if named.inode != target.inode:
            _exchange(txn, change, named, target)
        return Applied(named.inode, replaced=target.inode)
    if named.inode == target.inode:
        return Applied(named.inode)  # rename(2): two names of one file stay as they are
    if stat.S_ISDIR(there.mode):
        if not is_below(txn, change.parent, target.inode) and not stat.S_ISDIR(moved.mode):
            refuse(errno.EISDIR)
        if not is_empty(txn, target.inode):
            refuse(errno.ENOTEMPTY)
    elif stat.S_ISDIR(moved.mode):
        refuse(errno.ENOTDIR)
    _take_name(txn, change.to_parent, target)
    gone = _unlinked(txn, target.inode, change.at, held=change.held)
    if stat.S_ISDIR(there.mode):
        _touch(txn, change.to_parent, change.at, links=-1)
    _move(txn, change, named, moved)
    return Applied(named.inode, gone, target.inode)


def _set_attributes(txn: KeyValues, change: SetAttributes) -> Applied:
    old = inode(txn, change.inode)
    new = msgspec.structs.replace(
        old,
        mode=old.mode if change.mode is None else (old.mode & ~PERMISSIONS) | (change.mode & PERMISSIONS),
        uid=old.uid if change.uid is None else change.uid,
        gid=old.gid if change.gid is None else change.gid,
        atime=old.atime if change.atime is None else change.atime,
        mtime=old.mtime if change.mtime is None else change.mtime,
        ctime=change.at,
    )
    _put(txn, change.inode, new)
    return Applied(change.inode)


def _set_xattr(txn: KeyValues, change: SetXattr) -> Applied:
    there = inode(txn, change.inode)
    key = number_key(change.inode) + change.name
    known = txn.get("file_xattrs", key) is not None
    if known and change.create:
        refuse(errno.EEXIST)
    if not known and change.replace:
        refuse(errno.ENODATA)
    if not known:
        names = xattr_names(txn, change.inode)
        if sum(len(name) + 1 for name in (*names, change.name)) > XATTR_NAMES_BYTES_MAX:
            refuse(errno.ENOSPC)
    txn.put("file_xattrs", key, change.value)
    _put(txn, change.inode, msgspec.structs.replace(there, ctime=change.at))
    return Applied(change.inode)


def _remove_xattr(txn: KeyValues, change: RemoveXattr) -> Applied:
    there = inode(txn, change.inode)
    if not txn.delete("file_xattrs", number_key(change.inode) + change.name):
        refuse(errno.ENODATA)
    _put(txn, change.inode, msgspec.structs.replace(there, ctime=change.at))
    return Applied(change.inode)


def _mark_dirty(txn: KeyValues, change: MarkDirty) -> Applied:
    _file(txn, change.inode)
    txn.put("file_dirty", number_key(change.inode), b"")
    return Applied(change.inode)


def flushed(txn: KeyValues, change: Flush) -> Applied:
    old = _file(txn, change.inode)
    new = msgspec.structs.replace(old, size=change.size, mtime=change.mtime, ctime=max(old.ctime, change.ctime))
    _put(txn, change.inode, new)
    if change.clean:
        txn.delete("file_dirty", number_key(change.inode))
    if change.lacking is not None:
        _delete_of_file(txn, "file_lacking", change.inode)
        for node in change.lacking:
            txn.put("file_lacking", number_key(change.inode) + node.encode(), b"")
    return Applied(change.inode)


def _lacks(txn: KeyValues, change: Lacks) -> Applied:
    _file(txn, change.inode)
    if set(lacking(txn, change.inode)) <= {change.node}:  # one node holds it, or it is of no use to say so
        txn.put("file_lacking", number_key(change.inode) + change.node.encode(), b"")
    return Applied(change.inode)


def _held(txn: KeyValues, change: Held) -> Applied:
    _file(txn, change.inode)
    key = number_key(change.inode) + change.node.encode()
    txn.delete("file_lacking", key)
    if change.generation:
        txn.put("file_copies", key, change.generation.encode())
    return Applied(change.inode)


def _begin_writing(txn: KeyValues, change: BeginWriting) -> Applied:
    if txn.get("file_counters", b"space") is None:
        txn.put("file_counters", b"space", change.space.encode())
    txn.put("file_counters", b"next", number_key(_next(txn) + NUMBERS_SKIPPED))
    return Applied(ROOT)


def _drop(txn: KeyValues, change: Drop) -> Applied:
    if not txn.delete("file_orphans", number_key(change.inode)):
        refuse(errno.ENOENT)
    return Applied(change.inode, _forget(txn, change.inode, inode(txn, change.inode)))


def _set_user(txn: KeyValues, change: SetUser) -> Applied:
    key = change.name.encode()
    known = txn.get("file_users", key)
    if (known is None) != change.is_new:
        refuse(errno.ENOENT if known is None else errno.EEXIST)
    if known is not None:
        number = decode_user(known).number
    else:
        number = next_user(txn)
        txn.put("file_counters", b"user", number_key(number + 1))
    txn.put("file_users", key, encode(User(number, change.nt_hash, change.at)))
    return Applied(ROOT)


def _remove_user(txn: KeyValues, change: RemoveUser) -> Applied:
    if not txn.delete("file_users", change.name.encode()):
        refuse(errno.ENOENT)
    return Applied(ROOT)


# -- rows --------------------------------------------------------------------------------------------------------------


def _file(txn: KeyValues, number: int) -> Inode:
    found = inode(txn, number)
    if stat.S_ISDIR(found.mode):
        refuse(errno.EISDIR)
    return found if stat.S_ISREG(found.mode) else refuse(errno.EINVAL)


def _not_below(txn: KeyValues, number: int, moved: Inode, to_parent: int) -> None:
    if stat.S_ISDIR(moved.mode) and is_below(txn, to_parent, number):
        refuse(errno.EINVAL)


def _check_name(name: bytes) -> None:
    if len(name) > NAME_BYTES_MAX:
        refuse(errno.ENAMETOOLONG)
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        refuse(errno.EINVAL)


def _free_place(txn: KeyValues, parent: int, name: bytes) -> Inode:
    """The folder in which something new is to be."""
    found = folder(txn, parent)
    _check_name(name)
    if find(txn, parent, name):
        refuse(errno.EEXIST)
    if not found.nlink:
        refuse(errno.ENOENT)  # removed, and somebody is in it
    return found


def _next(txn: KeyValues) -> int:
    number = next_number(txn)
    txn.put("file_counters", b"next", number_key(number + 1))
    return number


def _put(txn: KeyValues, number: int, row: Inode) -> None:
    txn.put("file_inodes", number_key(number), encode(row))


def _touch(txn: KeyValues, number: int, at: int, links: int = 0) -> None:
    """A folder's names have changed, and by how many folders in it."""
    row = inode(txn, number)
    _put(txn, number, msgspec.structs.replace(row, mtime=at, ctime=at, nlink=row.nlink + links))


def _add_name(txn: KeyValues, parent: int, named: Named) -> None:
    key, number, position = number_key(parent), number_key(named.inode), number_key(named.position)
    txn.put("file_names", key + named.name, number + position)
    txn.put("file_listing", key + position, number + named.name)
    txn.put("file_folded", folded_key(parent, named), b"")


def _take_name(txn: KeyValues, parent: int, named: Named) -> None:
    key, position = number_key(parent), number_key(named.position)
    txn.delete("file_names", key + named.name)
    txn.delete("file_listing", key + position)
    txn.delete("file_folded", folded_key(parent, named))


def _delete_of_file(txn: KeyValues, table: str, number: int) -> None:
    for key, _ in of_file(txn, table, number):
        txn.delete(table, key)


def _unlinked(txn: KeyValues, number: int, at: int, *, held: bool) -> tuple[tuple[int, str], ...]:
    """A name of it was taken. Returns its copies if it is a file that is no more."""
    row = inode(txn, number)
    left = 0 if stat.S_ISDIR(row.mode) else row.nlink - 1
    if not left and not held:
        return _forget(txn, number, row)
    _put(txn, number, msgspec.structs.replace(row, nlink=left, ctime=at))
    if not left:
        txn.put("file_orphans", number_key(number), b"")
    return ()


def _forget(txn: KeyValues, number: int, row: Inode) -> tuple[tuple[int, str], ...]:
    copies = sorted({"", *generations(txn, number)})
    for table in ("file_copies", "file_lacking", "file_xattrs"):
        _delete_of_file(txn, table, number)
    txn.delete("file_dirty", number_key(number))
    txn.delete("file_inodes", number_key(number))
    return tuple((number, generation) for generation in copies) if stat.S_ISREG(row.mode) else ()


def _move(txn: KeyValues, change: Rename, named: Named, moved: Inode) -> None:
    is_folder = stat.S_ISDIR(moved.mode)
    _take_name(txn, change.parent, named)
    _add_name(txn, change.to_parent, Named(named.inode, _next(txn), change.to_name))
    _touch(txn, change.parent, change.at, links=-1 if is_folder else 0)
    _touch(txn, change.to_parent, change.at, links=1 if is_folder else 0)
    _moved(txn, named.inode, change.to_parent, change.at)


def _exchange(txn: KeyValues, change: Rename, named: Named, target: Named) -> None:
    _take_name(txn, change.parent, named)
    _take_name(txn, change.to_parent, target)
    _add_name(txn, change.parent, Named(target.inode, named.position, named.name))
    _add_name(txn, change.to_parent, Named(named.inode, target.position, target.name))
    folders = stat.S_ISDIR(inode(txn, named.inode).mode) - stat.S_ISDIR(inode(txn, target.inode).mode)
    _touch(txn, change.parent, change.at, links=-folders)
    _touch(txn, change.to_parent, change.at, links=folders)
    _moved(txn, named.inode, change.to_parent, change.at)
    _moved(txn, target.inode, change.parent, change.at)


def _moved(txn: KeyValues, number: int, parent: int, at: int) -> None:
    row = inode(txn, number)
    _put(txn, number, msgspec.structs.replace(row, ctime=at, parent=parent))


CARRIED_OUT: Final[dict[type[Change], Callable[[KeyValues, Any], Applied]]] = {
    BeginWriting: _begin_writing,
    Make: _make,
    Link: _link,
    Remove: _remove,
    Rename: _rename,
    SetAttributes: _set_attributes,
    SetXattr: _set_xattr,
    RemoveXattr: _remove_xattr,
    MarkDirty: _mark_dirty,
    Flush: flushed,
    Lacks: _lacks,
    Held: _held,
    Drop: _drop,
    SetUser: _set_user,
    RemoveUser: _remove_user,
}
