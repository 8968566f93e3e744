"""The records of the share's files: inodes, and the changes to names and attributes that the log has."""

import msgspec

ROOT: int = 1  # inode number of the share's topmost folder


class Inode(msgspec.Struct, frozen=True, array_like=True):
    """What stat(2) tells. Times are nanoseconds since the epoch."""

    mode: int  # kind and permissions, as st_mode
    uid: int
    gid: int
    nlink: int
    size: int  # bytes: of a file when it was flushed last, of a symbolic link's target
    atime: int
    mtime: int
    ctime: int
    rdev: int = 0  # of a device
    parent: int = 0  # the folder that it is in; of what has several names, where it got the last one
    target: bytes = b""  # of a symbolic link


class Make(msgspec.Struct, frozen=True, tag="make", array_like=True):
    """A file, folder, symbolic link, FIFO, socket or device comes to be, with the next inode number. `dirty`: it is a
    file that is about to be written to."""

    parent: int
    name: bytes
    mode: int  # with its kind
    uid: int
    gid: int
    at: int
    rdev: int = 0
    target: bytes = b""
    dirty: bool = False


class Link(msgspec.Struct, frozen=True, tag="link", array_like=True):
    """One more name for what isn't a folder."""

    inode: int
    parent: int
    name: bytes
    at: int


class Remove(msgspec.Struct, frozen=True, tag="remove", array_like=True):
    """unlink(2), or rmdir(2) of a `folder`. `held`: it is open, so it lives on without a name until `Drop`."""

    parent: int
    name: bytes
    folder: bool
    at: int
    held: bool = False


class Rename(msgspec.Struct, frozen=True, tag="rename", array_like=True):
    """rename(2), or renameat2(2) with `no_replace` or `exchange`. `held`: what it replaces is open."""

    parent: int
    name: bytes
    to_parent: int
    to_name: bytes
    at: int
    no_replace: bool = False
    exchange: bool = False
    held: bool = False


class SetAttributes(msgspec.Struct, frozen=True, tag="set", array_like=True):
    """chmod(2), chown(2), utimensat(2): what is None stays. Of `mode` the permissions count."""

    inode: int
    at: int
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime: int | None = None
    mtime: int | None = None


class SetXattr(msgspec.Struct, frozen=True, tag="set-xattr", array_like=True):
    """setxattr(2): `create` and `replace` as its flags."""

    inode: int
    name: bytes
    value: bytes
    at: int
    create: bool = False
    replace: bool = False


class RemoveXattr(msgspec.Struct, frozen=True, tag="remove-xattr", array_like=True):
    inode: int
    name: bytes
    at: int


class Drop(msgspec.Struct, frozen=True, tag="drop", array_like=True):
    """What has no name any more isn't open any more either."""

    inode: int


class MarkDirty(msgspec.Struct, frozen=True, tag="dirty", array_like=True):
    """From here on the bytes of a file may be others than those that were flushed last."""

    inode: int


class Flush(msgspec.Struct, frozen=True, tag="flush", array_like=True):
    """The bytes of a file are durable. `clean`: and nothing is being written to it any more. `lacking`: the nodes that
    don't hold them; None: as before."""

    inode: int
    size: int
    mtime: int
    ctime: int
    clean: bool
    lacking: tuple[str, ...] | None = None


class Lacks(msgspec.Struct, frozen=True, tag="lacks", array_like=True):
    """A node's copy of a file's bytes is lost, or isn't what was flushed. Of the last copy that isn't noted: it may
    come back with its disk."""

    inode: int
    node: str


class Held(msgspec.Struct, frozen=True, tag="held", array_like=True):
    """A node holds what was flushed again, in the copy of this generation."""

    inode: int
    node: str
    generation: str


class BeginWriting(msgspec.Struct, frozen=True, tag="begin", array_like=True):
    """A writer begins. What an earlier one made and never had committed may have left bytes on a disk: their inode
    numbers are never given again. `space` is the name of the numbers from the first writer on: those of a catalogue
    that was made anew are others."""

    space: str


class User(msgspec.Struct, frozen=True, array_like=True):
    """Who may use the share over the network."""

    number: int  # never given again: the user's numbers on both nodes are made of it
    nt_hash: bytes  # of the password, as SMB has it: 16 bytes, worth as much as the password
    at: int  # when that was set


class SetUser(msgspec.Struct, frozen=True, tag="set-user", array_like=True):
    """A user comes to be (`is_new`), or gets another password."""

    name: str
    nt_hash: bytes
    at: int
    is_new: bool


class RemoveUser(msgspec.Struct, frozen=True, tag="remove-user", array_like=True):
    name: str


Names = Make | Link | Remove | Rename | Drop
Attributes = SetAttributes | SetXattr | RemoveXattr
Copies = Lacks | Held
Users = SetUser | RemoveUser
Change = BeginWriting | Names | Attributes | MarkDirty | Flush | Copies | Users

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_inode = msgspec.msgpack.Decoder(Inode).decode
decode_user = msgspec.msgpack.Decoder(User).decode
