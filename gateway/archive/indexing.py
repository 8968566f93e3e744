"""DICOM files in the share's files: found when they are closed and quiet, and known to the catalogue where they lie.

What is to be looked at is in the log's state (`storage/state/file_images.py`), so nothing is overlooked, whatever is
restarted when. The primary looks, and says to both nodes what it has seen.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from conf.settings import DicomSettings, ShareSettings
from conf.telling import place_of, reason_of
from gateway.dicom.identify import Identity, Unreadable, identify
from gateway.dicom.part10 import HEADER_BYTES_MAX, MEDIA_DIRECTORY, Header, read_header
from gateway.dicom.sop_classes import is_storage_class, is_transfer_syntax
from gateway.dicom.whole import Whole
from storage.state.model import Put
from storage.store import NotServing, Store, Unlooked

log = structlog.get_logger()

LOOK_S: Final = 1.0
QUIET_S: Final = 2.0  # since it was written to last: some programs close a file and open it again
AT_ONCE: Final = 100
READ_AT_ONCE: Final = 2  # files; modalities go before
AGAIN_S: Final = 30.0  # after one that couldn't be read
AGAIN_MAX: Final = 10_000  # of which that is remembered
FAILED_MAX: Final = 50  # in one pass
LONG, LONG_S = 1000, 10.0  # so many that are left aren't gone through each second
READ_S: Final = 30.0
SLOWEST_BYTES_S: Final = 1 << 20
RECYCLED: Final = "/.recycle"


class NoInstance(Exception):
    """A file that isn't, or isn't taken for, an instance; the text says why."""


class Indexing:
    def __init__(self, store: Store, share: ShareSettings, dicom: Callable[[], DicomSettings]) -> None:
        """`dicom()`: the settings in force now."""
        self._store, self._share, self._dicom = store, share, dicom
        self._again: dict[int, float] = {}  # inode number -> not before

    async def run(self) -> None:
        while True:
            left = 0
            try:
                if self._store.may_serve:
                    left = await self.look()
            except NotServing:
                pass
            except Exception as error:  # whatever it is, files are looked at again
                log.error("index.failed", error=place_of(error))
                left = LONG
            await asyncio.sleep(LOOK_S if left < LONG else LONG_S)

    async def look(self) -> int:
        """At all that is to be looked at and quiet. Returns how many files are left. Raises NotServing."""
        after = left = failed = 0
        while failed < FAILED_MAX and (files := await self._store.unlooked(AT_ONCE, after)):
            after = files[-1].number
            quiet = [file for file in files if self._is_quiet(file)]
            left += len(files) - len(quiet)
            for start in range(0, len(quiet), READ_AT_ONCE):
                done = await asyncio.gather(*(self._index(file) for file in quiet[start : start + READ_AT_ONCE]))
                failed += done.count(False)
        return left + failed

    async def _folders(self) -> dict[int, bool]:
        """Whether what is below a folder is indexed, by its inode number."""
        share = self._share
        left_out = [*share.index_not, RECYCLED, *([share.takes_in] if share.takes_in else [])]
        said = dict.fromkeys(share.index, True) | dict.fromkeys(left_out, False)
        found = await self._store.shared_folders(said)
        return {number: said[path] for path, number in found.items()}

    def _is_quiet(self, file: Unlooked) -> bool:
        age_s = time.time() - file.mtime / 1e9
        return (age_s >= QUIET_S or age_s < 0) and self._again.get(file.number, 0.0) <= time.monotonic()

    async def _is_wanted(self, file: Unlooked) -> bool:
        wanted = await self._folders()
        return next((wanted[number] for number in file.folders if number in wanted), False)

    async def _index(self, file: Unlooked) -> bool:
        """False: it couldn't be read, and is tried again later. Raises NotServing."""
        self._again.pop(file.number, None)
        try:
            async with asyncio.timeout(READ_S + file.size / SLOWEST_BYTES_S):
                put = await self._read(file) if await self._is_wanted(file) else None
            if put is not None and not await self._is_wanted(file):  # a folder that is left out was made meanwhile
                put = None
            await self._store.index_file(file, put)
        except NotServing:
            raise
        except Exception as error:  # whatever a file leads to: the others are looked at all the same
            if len(self._again) >= AGAIN_MAX:
                self._again.clear()
            self._again[file.number] = time.monotonic() + AGAIN_S
            why = reason_of(error) if isinstance(error, OSError) else place_of(error)
            log.info("index.later", inode=file.number, why=why)
            return False
        return True

    async def _read(self, file: Unlooked) -> Put | None:
        """What a file is, None for no instance. Raises OSError."""
        try:
            return await self._instance(file)
        except NoInstance as error:
            log.debug("index.none", inode=file.number, why=str(error))
            return None

    async def _instance(self, file: Unlooked) -> Put:
        """Raises NoInstance, OSError."""
        path = await self._store.shared_file(file.number)
        if path is None:
            raise OSError(0, "this node holds no copy of it now")
        header, identity = await self._store.run(identified, path, self._dicom())
        whole = Whole(header.transfer_syntax)
        digest, blocks, length = await self._store.digests(path, header.start, whole.feed)
        if length != file.size:
            raise OSError(0, "it isn't as long as it should be")
        if whole.cut_short:
            raise NoInstance("it ends in the middle of an element: whoever copied it was cut off")
        return identity.record(header.transfer_syntax, digest, length, header.start, blocks=blocks)


def identified(path: Path, settings: DicomSettings) -> tuple[Header, Identity]:
    """What a file's header says, and which instance its data set is. Blocks. Raises NoInstance, OSError."""
    with path.open("rb") as file:
        header = read_header(file.read(HEADER_BYTES_MAX))
        if header is None:
            raise NoInstance("no DICOM file")
        if header.sop_class == MEDIA_DIRECTORY:
            raise NoInstance("a DICOMDIR")
        if not is_transfer_syntax(header.transfer_syntax, settings):
            raise NoInstance(f"an unknown transfer syntax: {header.transfer_syntax!r}")
        file.seek(header.start)
        try:
            identity = identify(file, header.transfer_syntax, settings.default_character_set)
        except Unreadable as error:
            raise NoInstance(str(error)) from error
    if not is_storage_class(identity.sop_class, settings):
        raise NoInstance(f"no class of instances that are stored: {identity.sop_class!r}")
    if problem := identity.problem(lenient=settings.lenient_uids):
        raise NoInstance(problem)
    return header, identity
