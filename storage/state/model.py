"""The records that are stored and replicated. All are immutable msgspec structs, encoded as MessagePack."""

import msgspec

from storage.state.file_model import Change


class Put(msgspec.Struct, frozen=True, tag="put", omit_defaults=True):
    """One instance stored: identity, digest of the data set, and the query keys as text by DICOM keyword."""

    sop_instance: str
    sop_class: str
    study: str
    series: str
    transfer_syntax: str
    digest: bytes  # xxh3-128 of the data set
    length: int  # bytes of the file: preamble, file meta, data set
    offset: int  # bytes before the data set
    keys: dict[str, str]
    calling_ae: str
    received: float  # wall clock, seconds since the epoch; for people, never for decisions
    replaces: bool = False  # takes the place of an earlier version of the same SOP Instance UID
    blocks: bytes = b""  # xxh3-128 of each MB of a data set that is longer than one, see `storage.objects.blocks`


class Delete(msgspec.Struct, frozen=True, tag="delete"):
    """A study deleted, or one of its series, or one instance. As an entry of the log it is the tombstone."""

    study: str
    series: str  # "" for all
    sop_instance: str  # "" for all
    reason: str
    by: str
    at: float  # wall clock, for people


class Kept(msgspec.Struct, frozen=True):
    """The head of an instance's data set. `data`: elements, encoded as the data set was, but not deflated; `left_out`:
    tags of those that were too long."""

    data: bytes
    left_out: tuple[int, ...]


class Void(msgspec.Struct, frozen=True, tag="void"):
    """What is left in the log of an instance that was deleted or replaced, or of what was forgotten: its number."""


class Task(msgspec.Struct, frozen=True, tag="task"):
    """Work that was promised to a client and outlives the primary that promised it."""

    id: str
    kind: str  # whose business it is
    by: str  # AE title of the client
    body: bytes  # MessagePack, as `kind` has it
    at: float  # wall clock


class TaskDone(msgspec.Struct, frozen=True, tag="task-done"):
    """A task is over, however it ended."""

    id: str
    outcome: str


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """Both nodes have the log up to `upto`: the entries of deletions and of ended tasks up to there leave nothing."""

    upto: int


class Files(msgspec.Struct, frozen=True, tag="files"):
    """A change of the share's names and attributes."""

    change: Change


class IndexFile(msgspec.Struct, frozen=True, tag="index-file"):
    """A file of the share was looked at, as it was since the entry `since`. `put`: the instance that it is, None if it
    is none."""

    number: int  # inode number
    since: int
    put: Put | None = None


Operation = Put | Delete | Void | Task | TaskDone | Forget | Files | IndexFile


class Entry(msgspec.Struct, frozen=True):
    """One change in the log. (epoch, seq) is its identity on every node."""

    epoch: int
    seq: int
    operation: Operation


class Instance(msgspec.Struct, frozen=True):
    """Catalogue row of one instance."""

    seq: int
    put: Put


class Location(msgspec.Struct, frozen=True):
    """Where this node's copy lies. `spool` is its name until it is published; recovery looks at both."""

    volume: str  # UUID of the volume
    spool: str  # file name in the volume's spool folder
    path: str  # below the volume's tree, "" before publication


class Leaving(msgspec.Struct, frozen=True):
    """A file that the catalogue no longer names and that is still to be moved out of the way."""

    location: Location
    sop_instance: str
    reason: str
    keep: bool  # in quarantine; False: another verified copy of it is on this node


class Tombstone(msgspec.Struct, frozen=True):
    """An instance that was deleted, by the entry `seq`."""

    seq: int
    reason: str
    at: float


_encoder = msgspec.msgpack.Encoder()
_entry = msgspec.msgpack.Decoder(Entry)
_location = msgspec.msgpack.Decoder(Location)
_task = msgspec.msgpack.Decoder(Task)
_leaving = msgspec.msgpack.Decoder(Leaving)

encode = _encoder.encode
decode_entry = _entry.decode
decode_location = _location.decode
decode_task = _task.decode
decode_leaving = _leaving.decode
