"""The names of the share's files, which no file says of itself: from the old catalogue, and from the log behind it."""

from collections.abc import Iterable

from storage.state.catalogue import Catalogue
from storage.state.changes import apply_files
from storage.state.file_images import look_at_all
from storage.state.file_model import Change
from storage.state.file_rows import TABLES
from storage.state.file_soundness import broken
from storage.state.kv import Transaction
from tools.rebuild.old import Old

TAKEN = (*TABLES, "file_gone")


class Unsound(Exception):
    """Rows are missing."""


def take_names(catalogue: Catalogue, old: Old, changes: Iterable[Change]) -> int | None:
    """Returns how many names there are now; None if what can be read of them doesn't agree with itself: then none are
    taken. `changes` came after what the old catalogue shows."""

    def take(txn: Transaction) -> int:
        for table in TAKEN:
            for key, value in old.rows(table):
                txn.put(table, key, value)
        for change in changes:
            apply_files(txn, 0, change)
        look_at_all(txn)
        if any(True for _ in broken(txn)):
            raise Unsound
        return txn.count("file_names")

    try:
        return catalogue.kv.update(take)
    except Unsound:
        return None
