"""Do the rows of the share's files agree with one another? The invariants of `storage.state.files`, on all rows."""

import stat
from collections import Counter
from collections.abc import Iterator

from storage.state import file_images, file_rows
from storage.state.file_model import ROOT, Inode, decode_inode
from storage.state.file_rows import NUMBER_BYTES, Named, number_key, number_of
from storage.state.kv import Transaction


def broken(txn: Transaction) -> Iterator[str]:
    """What contradicts itself. Reads all of it."""
    inodes = {number_of(key): decode_inode(value) for key, value in txn.scan("file_inodes")}
    names = dict(txn.scan("file_names"))
    links: Counter[int] = Counter()
    folders: Counter[int] = Counter()
    for key, value in names.items():
        parent, name = number_of(key[:NUMBER_BYTES]), key[NUMBER_BYTES:]
        named = Named(number_of(value[:NUMBER_BYTES]), number_of(value[NUMBER_BYTES:]), name)
        links[named.inode] += 1
        row = inodes.get(named.inode)
        if row is None:
            yield f"a name of inode {named.inode}, which isn't there"
        elif stat.S_ISDIR(row.mode):
            folders[parent] += 1
            if row.parent != parent:
                yield f"folder {named.inode} is in {parent} and says {row.parent}"
        if next(file_rows.listed(txn, parent, named.position - 1), None) != named:
            yield f"a name of inode {named.inode} isn't listed where it says"
        if txn.get("file_folded", file_rows.folded_key(parent, named)) is None:
            yield f"a name of inode {named.inode} isn't found without regard to case"
    numbers = [user.number for user in file_rows.users(txn).values()]
    if len(set(numbers)) < len(numbers) or max(numbers, default=-1) >= file_rows.next_user(txn):
        yield "a number that a user has may be given again"
    highest = max((*inodes, *(number_of(value[NUMBER_BYTES:]) for value in names.values())), default=0)
    if highest >= file_rows.next_number(txn) or (inodes and not file_rows.space(txn)):
        yield "numbers that are given may be given again"
    for table in ("file_listing", "file_folded"):
        if txn.count(table) != len(names):
            yield f"{len(names)} names, and {txn.count(table)} rows in {table}"
    for number, row in inodes.items():
        yield from _broken_inode(txn, number, row, links[number], folders[number])
    for table in ("file_dirty", "file_lacking", "file_copies"):
        for key, _ in txn.scan(table):
            row = inodes.get(number_of(key[:NUMBER_BYTES]))
            if row is None or not stat.S_ISREG(row.mode):
                yield f"inode {number_of(key[:NUMBER_BYTES])} is in {table}, and no file"
    for key, _ in txn.scan("file_xattrs"):
        if number_of(key[:NUMBER_BYTES]) not in inodes and key[:NUMBER_BYTES] != number_key(ROOT):
            yield f"attributes of inode {number_of(key[:NUMBER_BYTES])}, which isn't there"
    yield from file_images.broken(txn)


def _broken_inode(txn: Transaction, number: int, row: Inode, names: int, folders: int) -> Iterator[str]:
    is_orphan = txn.get("file_orphans", number_key(number)) is not None
    is_folder = stat.S_ISDIR(row.mode)
    if is_orphan == bool(names or number == ROOT):
        yield f"inode {number} has {names} names, and is{'' if is_orphan else 'nt'} an orphan"
    if names > 1 and is_folder:
        yield f"folder {number} has {names} names"
    expected = (2 + folders if names or number == ROOT else 0) if is_folder else names
    if row.nlink != expected:
        yield f"inode {number} says {row.nlink} links and has {expected}"
    if is_folder and names and not file_rows.is_below(txn, number, ROOT):
        yield f"folder {number} doesn't end at the root"
