"""FUSE requests translated: decode, call `storage.files.share`, encode. Needs the extra `share` (pyfuse3).

On the node that is written to only this mount changes the tree, so the kernel may remember names and attributes for
long; on the other one it may not, and reads the bytes anew at each open.
"""

import errno
import functools
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, ParamSpec, TypeVar

import pyfuse3
import structlog

from conf.mounts import OPEN, UNWRITTEN
from conf.telling import place_of
from storage.files.share import Share
from storage.state.file_model import ROOT, Inode

log = structlog.get_logger()

P = ParamSpec("P")
T = TypeVar("T")
REMEMBERED_S: Final = 60.0  # by the kernel: names and attributes
BLOCK_BYTES: Final = 512  # of st_blocks
# smbd asks a folder for a name so, in any case (vfs_glusterfs_fuse), instead of reading all of it.
REAL_NAME: Final = b"glusterfs.get_real_filename:"
IO_BYTES: Final = 1 << 20
SELF, ABOVE = 1, 2  # positions of "." and ".." in a listing


def answered(call: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Errors become errnos; what nobody expected is EIO, and logged."""

    @functools.wraps(call)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            await args[0]._share.room()  # type: ignore[attr-defined]
            return await call(*args, **kwargs)
        except OSError as error:
            if error.errno == errno.EIO:
                log.error("share.failed", call=call.__name__, why=error.strerror)
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            log.error("share.unhandled", call=call.__name__, error=place_of(error))
            raise pyfuse3.FUSEError(errno.EIO) from None

    return answer


class Operations(pyfuse3.Operations):  # type: ignore[misc]
    """Handles are inode numbers."""

    supports_dot_lookup = True

    def __init__(self, share: Share) -> None:
        super().__init__()
        self._share = share
        self._remembered_s = REMEMBERED_S if share.writes else 0.0

    def _entry(self, number: int, row: Inode | None = None) -> Any:
        row = row or self._share.attributes(number)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_mode, entry.st_nlink = number, row.mode, row.nlink
        entry.st_uid, entry.st_gid, entry.st_rdev, entry.st_size = row.uid, row.gid, row.rdev, row.size
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = row.atime, row.mtime, row.ctime
        entry.st_blksize, entry.st_blocks = IO_BYTES, -(-row.size // BLOCK_BYTES)
        entry.entry_timeout = entry.attr_timeout = self._remembered_s
        return entry

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, _ in inode_list:
            self._share.forget(inode)

    # -- names ---------------------------------------------------------------------------------------------------

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> Any:
        if name == b".":
            return self._entry(parent_inode)
        if name == b"..":
            return self._entry(self._share.parent_of(parent_inode))
        try:
            return self._entry(self._share.lookup(parent_inode, name))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        absent = pyfuse3.EntryAttributes()  # which the kernel may remember as well
        absent.st_ino, absent.entry_timeout = 0, self._remembered_s
        return absent

    @answered
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> Any:
        return self._entry(
            await self._share.make(parent_inode, name, stat.S_IFDIR | stat.S_IMODE(mode), ctx.uid, ctx.gid)
        )

    @answered
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        return self._entry(await self._share.make(parent_inode, name, mode, ctx.uid, ctx.gid, rdev))

    @answered
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> Any:
        mode = stat.S_IFLNK | 0o777
        return self._entry(await self._share.make(parent_inode, name, mode, ctx.uid, ctx.gid, target=target))

    @answered
    async def readlink(self, inode: int, ctx: Any) -> bytes:
        return self._share.attributes(inode).target

    @answered
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> Any:
        await self._share.link(inode, new_parent_inode, new_name)
        return self._entry(inode)

    @answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        await self._share.remove(parent_inode, name, folder=False)

    @answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        await self._share.remove(parent_inode, name, folder=True)

    @answered
    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes, flags: int, ctx: Any
    ) -> None:
        if flags & ~(pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, "flags")
        await self._share.rename(
            parent_inode_old,
            name_old,
            parent_inode_new,
            name_new,
            no_replace=bool(flags & pyfuse3.RENAME_NOREPLACE),
            exchange=bool(flags & pyfuse3.RENAME_EXCHANGE),
        )

    @answered
    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    @answered
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        reply, row = pyfuse3.readdir_reply, self._share.attributes(fh)
        if start_id < SELF and not reply(token, b".", self._entry(fh, row), SELF):
            return
        if start_id < ABOVE and not reply(token, b"..", self._entry(row.parent or ROOT), ABOVE):
            return
        after = max(start_id, ABOVE)
        while row.nlink and (found := self._share.listed(fh, after)):
            for one, of_it in found:
                if not reply(token, one.name, self._entry(one.inode, of_it), one.position):
                    return
                after = one.position

    @answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._share.all_committed()

    # -- attributes ----------------------------------------------------------------------------------------------

    @answered
    async def getattr(self, inode: int, ctx: Any) -> Any:
        return self._entry(inode)

    @answered
    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        share = self._share
        if fields.update_size:
            await share.truncate(inode, attr.st_size)
        changed: dict[str, int] = {}
        if fields.update_mode:
            changed["mode"] = stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            changed["uid"] = attr.st_uid
        if fields.update_gid:
            changed["gid"] = attr.st_gid
        if fields.update_atime:
            changed["atime"] = attr.st_atime_ns
        if fields.update_mtime:
            changed["mtime"] = attr.st_mtime_ns
        if changed or not fields.update_size:
            share.set_attributes(inode, **changed)
        return self._entry(inode)

    @answered
    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        if name == OPEN.encode():
            return str(self._share.handles(inode)).encode()
        if name == UNWRITTEN.encode():
            return b"1" if await self._share.ends_unwritten(inode) else b"0"
        if name.startswith(REAL_NAME):
            return self._share.real_name(inode, name.removeprefix(REAL_NAME)) + b"\0"
        return self._share.xattr(inode, name)

    @answered
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        self._share.set_xattr(inode, name, value)

    @answered
    async def listxattr(self, inode: int, ctx: Any) -> list[bytes]:
        return self._share.xattr_names(inode)

    @answered
    async def removexattr(self, inode: int, name: bytes, ctx: Any) -> None:
        self._share.remove_xattr(inode, name)

    @answered
    async def statfs(self, ctx: Any) -> Any:
        space, found = await self._share.capacity(), pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = os.sysconf("SC_PAGESIZE")
        found.f_blocks = space.total // found.f_frsize
        found.f_bfree = found.f_bavail = space.free // found.f_frsize
        found.f_files, found.f_ffree = space.inodes, space.inodes_free
        found.f_favail, found.f_namemax = space.inodes_free, 255
        return found

    # -- bytes ---------------------------------------------------------------------------------------------------

    @answered
    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        if await self._share.look_again(inode):
            pyfuse3.invalidate_inode(inode, attr_only=True)
        self._share.open(inode)
        if flags & os.O_TRUNC:
            try:
                await self._share.truncate(inode, 0)
            except BaseException:
                await self._share.release(inode)
                raise
        return pyfuse3.FileInfo(fh=inode, keep_cache=self._share.writes)

    @answered
    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> tuple[Any, Any]:
        number = self._share.create(parent_inode, name, stat.S_IFREG | stat.S_IMODE(mode), ctx.uid, ctx.gid)
        return pyfuse3.FileInfo(fh=number, keep_cache=True), self._entry(number)

    @answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self._share.read(fh, off, size)

    @answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        await self._share.write(fh, off, buf)
        return len(buf)

    @answered
    async def flush(self, fh: int) -> None:
        await self._share.flush(fh)

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._share.fsync(fh)

    @answered
    async def release(self, fh: int) -> None:
        await self._share.release(fh)
