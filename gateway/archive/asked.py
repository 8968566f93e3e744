"""What goes to a query process and comes back."""

import msgspec

USED: tuple[str, ...] = ("aet", "name_matching", "relational_queries", "response_character_set")
"""The settings, of `DicomSettings`, that a query depends on."""


class Asked(msgspec.Struct, frozen=True, array_like=True):
    """A query, as it came: nothing of it has been looked at. `extended`: what was agreed on, see `find.Extended`;
    `settings`: those of `USED`; `catalogue`: see `Store.for_other_processes`; `unreadable`: see `Store.unreadable`,
    None where they are too many: the gateway is asked; `heads`: kept ones may be used."""

    identifier: bytes
    transfer_syntax: str
    sop_class: str
    extended: tuple[bool, bool, bool]
    settings: tuple[str | bool, ...]
    catalogue: tuple[str, int]
    unreadable: tuple[int, ...] | None
    heads: bool


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """Some encoded answers, whether those were the last, and how long it took. `ignored`: there are keys that can't be
    matched at this level; `odd`: why answers couldn't be said as they are, in terms of our code."""

    answers: list[bytes]
    ended: bool
    took_s: float
    ignored: bool
    odd: list[str]
