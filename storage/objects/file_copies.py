"""This node's copies of the share's files, for who reads an instance where it lies."""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from storage.files.local import name_of
from storage.objects.blocks import BLOCK_BYTES, BlockDigests
from storage.objects.volume import Volume
from storage.objects.volumes import Volumes
from storage.state import file_images, file_rows, instances
from storage.state.catalogue import Catalogue
from storage.state.file_images import Unlooked
from storage.state.file_model import ROOT
from storage.state.kv import KeyValues
from storage.state.model import Put

READ_BYTES: Final = 1 << 20


class FileCopies:
    """All methods block."""

    def __init__(self, catalogue: Catalogue, volumes: Volumes, node: str) -> None:
        self._catalogue, self._volumes, self._node = catalogue, volumes, node

    def instance(self, seq: int) -> tuple[Volume, str, Put] | None:
        """(volume, file, record) of an instance by the number that its row has; None if this node holds no copy now."""
        with self._catalogue.kv.read() as txn:
            number = file_images.file_of(txn, seq)
            image = file_images.image(txn, number) if number is not None else None
            row = instances.get(txn, instances.key_of(image.sop_instance)) if image else None
        if number is None or image is None or row is None or row.seq != seq:
            return None
        found = self.find(number)
        return (*found, msgspec.structs.replace(row.put, blocks=image.blocks)) if found else None

    def find(self, number: int) -> tuple[Volume, str] | None:
        """(volume, file) of what was flushed last of a file, None if this node doesn't hold it now."""
        with self._catalogue.kv.read() as txn:
            if file_rows.is_gone(txn, number) or self._node in file_rows.lacking(txn, number):
                return None
            name = name_of(file_rows.space(txn), number, file_rows.generation(txn, number, self._node))
        for slot in self._volumes.slots:
            if slot.usable and slot.volume is not None:
                try:
                    slot.volume.size(name)
                except OSError:
                    continue
                return slot.volume, name
        return None

    def unlooked(self, limit: int, after: int) -> list[Unlooked]:
        """Files that are to be looked at, see `file_images`, of the numbers behind one."""
        with self._catalogue.kv.read() as txn:
            return list(islice(file_images.unlooked(txn, after), limit))

    def folders(self, paths: Iterable[str]) -> dict[str, int]:
        """The inode numbers of those of these folders of the share that are there, by their paths from the topmost, in
        any case as over SMB."""
        with self._catalogue.kv.read() as txn:
            found = {path: _folder(txn, path) for path in paths}
        return {path: number for path, number in found.items() if number is not None}


def _folder(txn: KeyValues, path: str) -> int | None:
    number = ROOT
    for name in filter(None, path.split("/")):
        real = file_rows.real_name(txn, number, name.encode())
        named = file_rows.find(txn, number, real) if real is not None else None
        if named is None:
            return None
        number = named.inode
    return number


def data_digests(path: Path, start: int, feed: Callable[[bytes], None]) -> tuple[bytes, bytes, int]:
    """See `Store.digests`. Blocks."""
    digest, blocks, length = xxhash.xxh3_128(), BlockDigests(), start
    with path.open("rb") as file:
        file.seek(start)
        while data := file.read(READ_BYTES):
            digest.update(data)
            blocks.update(data)
            feed(data)
            length += len(data)
    return digest.digest(), blocks.digests() if length - start > BLOCK_BYTES else b"", length
