"""The entries of the log as the catalogue keeps them.

Table `entries` has those that aren't applied yet, and those that are no instances. Of an applied instance the
catalogue's row says everything: table `kept` has its key by the entry's number, `blocks` what a long one's blocks are.
An entry that is in neither was an
instance that is deleted or replaced now. Table `log` only tells versions that had all of them there where the log ends.
"""

import msgspec

from storage.replication.epochs import Epochs
from storage.state import instances
from storage.state.kv import CatalogueDamaged, Transaction
from storage.state.model import Entry, Operation, Put, Void, decode_entry, encode


def seq_key(seq: int) -> bytes:
    return seq.to_bytes(8, "big")


def seq_of(key: bytes) -> int:
    return int.from_bytes(key, "big")


def operation_of(txn: Transaction, seq: int) -> Operation:
    """What an entry of the log says; also of a number that isn't in it: Void. Raises CatalogueDamaged."""
    key = seq_key(seq)
    if (raw := txn.get("entries", key)) is not None:
        return decode_entry(raw).operation
    if (kept := txn.get("kept", key)) is None:
        return Void()
    row = instances.get(txn, kept)
    if row is None or row.seq != seq:
        raise CatalogueDamaged(f"the instance of log entry {seq} is missing")
    blocks = txn.get("blocks", key)
    return row.put if blocks is None else msgspec.structs.replace(row.put, blocks=blocks)


def entry_of(txn: Transaction, seq: int, epochs: Epochs) -> Entry:
    """Raises CatalogueDamaged for one that isn't in the log."""
    try:
        return Entry(epochs.epoch_of(seq), seq, operation_of(txn, seq))
    except KeyError:
        raise CatalogueDamaged(f"log entry {seq} is missing") from None


def epochs_of(txn: Transaction) -> Epochs:
    """Those that the log's end in this snapshot has."""
    raw = txn.get("meta", b"epochs")
    return Epochs(msgspec.msgpack.decode(raw) if raw is not None else ())


def is_put(txn: Transaction, seq: int) -> bool:
    """The entry is an instance that is neither deleted nor replaced."""
    key = seq_key(seq)
    if txn.get("kept", key) is not None:
        return True
    raw = txn.get("entries", key)
    return raw is not None and isinstance(decode_entry(raw).operation, Put)


def applied(txn: Transaction, seq: int, put: Put) -> None:
    """The catalogue's row says it from here on."""
    key = seq_key(seq)
    txn.append("kept", key, instances.key_of(put.sop_instance))
    if put.blocks:
        txn.append("blocks", key, put.blocks)
    txn.delete("entries", key)


def void(txn: Transaction, seq: int) -> None:
    """Nothing is left of an instance but its number."""
    for table in ("kept", "blocks", "entries"):
        txn.delete(table, seq_key(seq))


def note_end(txn: Transaction, epochs: Epochs) -> None:
    """Where the log ends now."""
    for key in [key for key, _ in txn.scan("log")]:
        txn.delete("log", key)
    epoch, seq = epochs.last
    if seq:
        txn.put("log", seq_key(seq), encode(Entry(epoch, seq, Void())))
