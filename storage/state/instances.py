"""The row of an instance: what distinguishes it from the first instance of its series.

All images of a series say nearly the same. What the first one said is kept once, as the series' base, and stays as it
is while there are instances of that series; a row has the number of its series and what differs from the base. Table
`members` names the instances of each series, `tally` counts them by SOP class.
"""

from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from storage.state import keys
from storage.state.kv import CatalogueDamaged, Transaction
from storage.state.model import Instance, Put

NUMBER_BYTES: Final = 5
_DIGITS: Final = "0123456789."
_FILLER, _PLAIN = 15, b"\xff"  # behind an odd number of digits; before what is no UID by the Standard

_TAGS: Final = {**keys.ALL, **keys.OF_ALL}
_KEYWORDS: Final[dict[int | str, str]] = {tag: keyword for keyword, tag in _TAGS.items()}


class _Base(msgspec.Struct, frozen=True, array_like=True):
    study: str
    series: str
    sop_class: str
    transfer_syntax: str
    calling_ae: str
    keys: dict[str, str]


class _Row(msgspec.Struct, frozen=True, array_like=True):
    """None is what the base says; of `keys`, what it says and this instance doesn't."""

    seq: int
    series: bytes
    digest: bytes
    length: int
    offset: int
    received: float
    keys: dict[int | str, str | None]  # by tag
    sop_class: str | None
    transfer_syntax: str | None
    calling_ae: str | None
    replaces: bool


_base = msgspec.msgpack.Decoder(_Base)
_row = msgspec.msgpack.Decoder(_Row)
_tally = msgspec.msgpack.Decoder(dict[str, int])
decode_old = msgspec.msgpack.Decoder(Instance).decode  # a row of formats 1 and 2
_encode = msgspec.msgpack.Encoder().encode


def key_of(sop_instance: str) -> bytes:
    """A UID as a key: two of its digits and dots in a byte."""
    codes = [_DIGITS.find(one) for one in sop_instance]
    if -1 in codes or not codes:
        return _PLAIN + sop_instance.encode()
    if len(codes) % 2:
        codes.append(_FILLER)
    return bytes(high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True))


def uid_of(key: bytes) -> str:
    """The UID of a key."""
    if key.startswith(_PLAIN):
        return key[len(_PLAIN) :].decode()
    codes = [code for byte in key for code in (byte >> 4, byte & 15)]
    return "".join(_DIGITS[code] for code in codes if code != _FILLER)


def number_of(txn: Transaction, study: str, series: str) -> bytes | None:
    """Of a series that has instances; this node's own."""
    return txn.get("number", _key(study, series))


def put(txn: Transaction, seq: int, put: Put) -> None:
    """The row of an instance, and its series' base if it is the first."""
    number = number_of(txn, put.study, put.series)
    if number is None:
        last = txn.last_key("base")
        number = (int.from_bytes(last, "big") + 1 if last else 1).to_bytes(NUMBER_BYTES, "big")
        txn.put("number", _key(put.study, put.series), number)
        base = _Base(put.study, put.series, put.sop_class, put.transfer_syntax, put.calling_ae, put.keys)
        txn.put("base", number, _encode(base))
    else:
        base = _base.decode(txn.get("base", number) or b"")
    key = key_of(put.sop_instance)
    row = _Row(
        seq,
        number,
        put.digest,
        put.length,
        put.offset,
        put.received,
        _differing(base.keys, put.keys),
        None if put.sop_class == base.sop_class else put.sop_class,
        None if put.transfer_syntax == base.transfer_syntax else put.transfer_syntax,
        None if put.calling_ae == base.calling_ae else put.calling_ae,
        put.replaces,
    )
    txn.put("instances", key, _encode(row))
    if txn.get("members", number + key) is None:
        txn.put("members", number + key, b"")
        _count(txn, number, put.sop_class, 1)


def get(txn: Transaction, key: bytes) -> Instance | None:
    """Without digests of blocks, see `entries.operation_of`. Raises CatalogueDamaged for a row without its base."""
    raw = txn.get("instances", key)
    return None if raw is None else decode(key, raw, lambda number: txn.get("base", number))


def decode(key: bytes, raw: bytes, base_of: Callable[[bytes], bytes | None]) -> Instance:
    """A row, given what says its series' base. Raises CatalogueDamaged, msgspec.DecodeError."""
    row = _row.decode(raw)
    base_raw = base_of(row.series)
    if base_raw is None:
        raise CatalogueDamaged("the base of a series is missing")
    base = _base.decode(base_raw)
    found = base.keys
    if row.keys:
        found = dict(base.keys)
        for tag, value in row.keys.items():
            if value is None:
                found.pop(_KEYWORDS.get(tag, str(tag)), None)
            else:
                found[_KEYWORDS.get(tag, str(tag))] = value
    return Instance(
        row.seq,
        Put(
            uid_of(key),
            base.sop_class if row.sop_class is None else row.sop_class,
            base.study,
            base.series,
            base.transfer_syntax if row.transfer_syntax is None else row.transfer_syntax,
            row.digest,
            row.length,
            row.offset,
            found,
            base.calling_ae if row.calling_ae is None else row.calling_ae,
            row.received,
            row.replaces,
        ),
    )


def remove(txn: Transaction, put: Put) -> bool:
    """Returns whether it was the last of its series."""
    key = key_of(put.sop_instance)
    txn.delete("instances", key)
    number = number_of(txn, put.study, put.series)
    if number is None:
        return True
    was_there = txn.delete("members", number + key)
    if _count(txn, number, put.sop_class, -1 if was_there else 0):
        return False
    txn.delete("base", number)
    txn.delete("number", _key(put.study, put.series))
    return True


def tally(txn: Transaction, number: bytes | None) -> dict[str, int]:
    """How many instances of each SOP class a series has."""
    raw = txn.get("tally", number) if number is not None else None
    return {} if raw is None else _tally.decode(raw)


def _count(txn: Transaction, number: bytes, sop_class: str, more: int) -> int:
    """Returns how many instances the series has now."""
    found = tally(txn, number)
    found[sop_class] = found.get(sop_class, 0) + more
    found = {uid: some for uid, some in found.items() if some > 0}
    if found:
        txn.put("tally", number, _encode(found))
    else:
        txn.delete("tally", number)
    return sum(found.values())


def members(txn: Transaction, number: bytes | None) -> Iterator[bytes]:
    """Keys of the instances of a series."""
    if number is None:
        return
    for key, _ in txn.scan("members", number):
        if not key.startswith(number):
            return
        yield key[NUMBER_BYTES:]


def _differing(base: dict[str, str], own: dict[str, str]) -> dict[int | str, str | None]:
    if base == own:
        return {}
    found: dict[int | str, str | None] = {
        _TAGS.get(name, name): text for name, text in own.items() if base.get(name) != text
    }
    return found | {_TAGS.get(name, name): None for name in base if name not in own}


def _key(study: str, series: str) -> bytes:
    return f"{study}\0{series}".encode()
