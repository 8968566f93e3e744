"""Heads that are kept: of what is there, of nothing else, and what queries say by them is what the files say."""

import asyncio
import contextlib
import random
import shutil
import zlib
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import cast

import msgspec
import pytest
import xxhash
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from conf.settings import DicomSettings
from gateway.archive import keeping
from gateway.archive.asked import USED, Asked
from gateway.archive.head_process import Done, Task
from gateway.archive.keeping import HeadKeeping, KeptHeads
from gateway.archive.queries import Queries
from gateway.dicom.identifiers import encode_identifier
from gateway.dicom.identify import identify
from gateway.workers.pool import Worker
from storage.heads import FOLDER, Keeper, key_of, opened_again
from storage.state.catalogue import MADE_BY, Batch, Catalogue
from storage.state.kv import DATA_FILE
from storage.state.model import Delete, Entry, Location, Put
from storage.store import Store
from tests.builders import dataset, encoded
from tests.conftest import wait_for
from tools.benchmarks.query import FIND, SYNTAX

META = bytes(20)
MAP_BYTES = 1 << 20


class Archive:
    """As much of a store as heads need: a catalogue, and the copies in a folder."""

    def __init__(self, folder: Path) -> None:
        self.state, self.volume = folder / "state", folder / "volume"
        (self.volume / "spool").mkdir(parents=True)
        self.catalogue = Catalogue.open(self.state / "catalogue", MAP_BYTES)
        self.catalogue.write(Batch(meta={"lineage": "x", "promised": 1, **MADE_BY}))
        self.applied = 0
        self.unreadable: set[int] = set()
        self.reserve_bytes = 1 << 20
        self.asked_for: list[int] = []
        self.puts: dict[int, Put] = {}
        self.usable_volumes = [("volume", str(self.volume))]

    def store(self, image: Dataset, replaces: bool = False) -> int:
        self.applied += 1
        data = encoded(image)
        known = identify(BytesIO(data), ExplicitVRLittleEndian)
        digest = xxhash.xxh3_128_digest(data)
        put = Put(
            *(known.sop_instance, known.sop_class, known.study, known.series, str(ExplicitVRLittleEndian)),
            *(digest, len(META) + len(data), len(META), known.keys, "CT", 1.0),
            replaces=replaces,
        )
        (self.volume / "spool" / f"{self.applied}").write_bytes(META + data)
        self._write(put, Location("volume", f"{self.applied}", ""))
        self.puts[self.applied] = put
        return self.applied

    def delete(self, study: str) -> None:
        self.applied += 1
        self._write(Delete(study, "", "", "no longer needed", "somebody", 1.0), None)

    def _write(self, operation: Put | Delete, location: Location | None) -> None:
        entry = Entry(1, self.applied, operation)
        self.catalogue.write(Batch(appends=[(entry, location)], applies=[(entry, location)]))

    def for_other_processes(self) -> tuple[str, int]:
        return str(self.state / "catalogue"), self.catalogue.generation

    def forget_readers(self) -> None:
        self.catalogue.kv.forget_readers()

    async def beginning(self, seq: int, bytes_max: int) -> bytes | None:
        self.asked_for.append(seq)
        try:
            return (self.volume / "spool" / f"{seq}").read_bytes()[:bytes_max]
        except OSError:
            return None

    async def state_room(self) -> tuple[int, int]:
        return shutil.disk_usage(self.state).free, self.reserve_bytes

    @property
    def with_heads(self) -> set[int]:
        """Instances that have one now."""
        heads = opened_again(None, self.state / FOLDER)
        if heads is None:
            return set()
        found = {seq for seq, put in self.puts.items() if heads.get(seq, put) is not None}
        heads.close()
        return found

    @property
    def there(self) -> set[int]:
        return {one.seq for uid in self.puts.values() if (one := self.catalogue.instance(uid.sop_instance))}


@pytest.fixture
async def archive(tmp_path: Path) -> AsyncIterator[Archive]:
    made = Archive(tmp_path)
    yield made
    made.catalogue.close()


def some(count: int, study: str) -> list[Dataset]:
    comments = (f"{study} {number}" for number in range(count))
    series = f"{study}.1"
    return [
        dataset(StudyInstanceUID=study, SeriesInstanceUID=series, ImageComments=one, DetectorID=f"D{study[-1]}")
        for one in comments
    ]


class Passes:
    def __init__(self, archive: Archive) -> None:
        self.archive, self.worker = archive, Worker("gateway.archive.head_process")
        self.rows, self.most = 2000, 500

    async def run(self, verb: str = "keep", start: int = 0) -> tuple[int, int]:
        """(kept, gone), to the end."""
        kept, gone, after = 0, 0, b""
        while True:
            places = (self.archive.for_other_processes(), self.archive.usable_volumes)
            task = Task(*places, start, after, self.rows, self.most)
            done = msgspec.convert(await self.worker.ask(msgspec.msgpack.encode((verb, task)), 60.0), Done)
            kept, gone, start, after = kept + done.kept, gone + done.gone, done.next, done.after
            if not start and not after:
                return kept, gone

    async def settle(self) -> None:
        """Through all, until there is nothing to be done: when the first of a series goes, the others are made anew."""
        while await self.run(start=1) != (0, 0):
            pass


@pytest.fixture
async def passes(archive: Archive) -> AsyncIterator[Passes]:
    made = Passes(archive)
    yield made
    await made.worker.stop()


async def test_any_mixture_of_storing_and_deleting(archive: Archive, passes: Passes) -> None:
    rng = random.Random(5)
    studies = [f"1.2.{number}" for number in range(1, 6)]
    known: dict[str, list[Dataset]] = {study: [] for study in studies}
    for _ in range(60):
        passes.rows, passes.most = rng.choice([1, 2, 3, 2000]), rng.choice([1, 2, 500])
        study = rng.choice(studies)
        match rng.randrange(5):
            case 0 | 1:
                for image in some(rng.randrange(1, 5), study):
                    known[study].append(image)
                    archive.store(image)
            case 2 if known[study]:
                image = rng.choice(known[study])
                image.ImageComments = f"other {rng.random()}"
                archive.store(image, replaces=True)
            case 3:
                archive.delete(study)
                known[study].clear()
            case _:
                await passes.run()
        if rng.random() < 0.3:
            await passes.settle()
            assert archive.with_heads == archive.there
    await passes.settle()
    assert archive.with_heads == archive.there
    for study in studies:
        archive.delete(study)
    assert (await passes.run(start=1))[0] == 0
    assert archive.with_heads == set()
    await passes.run("prune")
    await passes.worker.stop()
    keeper = Keeper(archive.state / FOLDER)
    assert keeper.series(b"", 10) == []
    keeper.close()


async def test_a_copy_that_cant_be_read_is_seen_to_later(archive: Archive, passes: Passes) -> None:
    numbers = [archive.store(one) for one in some(3, "1.2.1")]
    archive.usable_volumes, volumes = [], archive.usable_volumes
    assert await passes.run() == (0, 0)
    archive.usable_volumes = volumes
    assert await passes.run(start=1) == (3, 0)
    assert archive.with_heads == set(numbers)


async def test_heads_of_other_bytes_arent_an_instances(archive: Archive, passes: Passes) -> None:
    """As after the catalogue was made anew from the files, with other numbers."""
    number = archive.store(some(1, "1.2.1")[0])
    await passes.run()
    heads = opened_again(None, archive.state / FOLDER)
    assert heads is not None
    other = msgspec.structs.replace(archive.puts[number], digest=bytes(16))
    assert heads.get(number, archive.puts[number]) is not None
    assert heads.get(number, other) is None
    heads.close()


async def test_damaged_ones_are_made_anew(archive: Archive, passes: Passes) -> None:
    numbers = {archive.store(one) for one in some(3, "1.2.1")}
    assert await passes.run() == (3, 0)
    await passes.worker.stop()
    (archive.state / FOLDER / DATA_FILE).write_bytes(bytes(100_000))
    assert await passes.run() == (3, 0)
    assert archive.with_heads == numbers


QUESTIONS: list[dict[str, str]] = [
    {"DetectorID": "D2", "ImageComments": ""},
    {"ImageComments": "*1"},
    {"DetectorID": "D*", "AcquisitionMatrix": "", "PatientComments": ""},
    {"DeviceSerialNumber": "", "ImageComments": "Größe*"},
]


@pytest.mark.parametrize("keys", QUESTIONS)
async def test_queries_say_the_same_by_heads_and_by_files(
    archive: Archive, passes: Passes, keys: dict[str, str]
) -> None:
    for number in range(1, 4):
        for image in some(5, f"1.2.{number}"):
            archive.store(image)
    umlauts = dataset(SpecificCharacterSet="ISO_IR 100", ImageComments="Größe 1", StudyInstanceUID="1.2.9")
    archive.store(umlauts)
    long = dataset(StudyInstanceUID="1.2.10", DetectorID="D2", ImageComments="x" * 9000)
    long.add_new(0x00181311, "OB", bytes(8000))
    archive.store(long)
    found = []
    for with_heads in (False, True):
        if with_heads:
            await passes.run()
        archive.asked_for.clear()
        found.append(await answers(archive, keys))
        assert bool(archive.asked_for) is not with_heads
    assert found[0] == found[1]
    assert found[0]


async def answers(archive: Archive, keys: dict[str, str], kept: KeptHeads | None = None) -> list[bytes]:
    identifier = Dataset()
    for keyword, text in {"QueryRetrieveLevel": "IMAGE", "SOPInstanceUID": "", **keys}.items():
        setattr(identifier, keyword, text or None)
    identifier.SpecificCharacterSet = "ISO_IR 192"
    settings = tuple(getattr(DicomSettings(), name) for name in USED)
    raw = encode_identifier(identifier, SYNTAX)
    asked = Asked(raw, SYNTAX, FIND, (True, False, False), settings, archive.for_other_processes(), (), True)
    processes = Queries(cast(Store, archive), 1, kept or KeptHeads(True))
    try:
        running, found = processes.begin(asked), list[bytes]()
        while not running.ended:
            found += (await running.more()).answers
        running.close()
        return found
    finally:
        await processes.stop()


def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"FIRST_S": 0.0, "LOOK_S": 0.1, "SWEEP_S": 1.0, "SWEEPS": 0.0, "IDLE_S": 0.3, "FAILED_S": 0.5}
    for name, one in seconds.items():
        monkeypatch.setattr(keeping, name, one)


async def test_they_are_kept_soon_and_forgotten_in_time(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    hurried(monkeypatch)
    kept = KeptHeads(True)
    task = asyncio.create_task(HeadKeeping(cast(Store, archive), kept).run())
    try:
        for study in ("1.2.1", "1.2.2"):
            numbers = {archive.store(one) for one in some(4, study)}
            await asyncio.to_thread(wait_for, lambda numbers=numbers: numbers <= archive.with_heads, "heads")
            await asyncio.sleep(1.0)  # the process may end meanwhile
        archive.delete("1.2.1")
        await asyncio.to_thread(wait_for, lambda: archive.with_heads == archive.there == numbers, "one study's heads")
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_one_that_is_replaced_costs_no_other_its_head(archive: Archive, passes: Passes) -> None:
    images = some(6, "1.2.1")
    for one in images:
        archive.store(one)
    await passes.run()
    images[0].ImageComments = "other"
    archive.store(images[0], replaces=True)
    await passes.run(start=1)
    assert archive.with_heads == archive.there


async def test_a_flipped_bit_is_never_believed(archive: Archive, passes: Passes) -> None:
    for one in some(2, "1.2.1"):
        archive.store(one)
    await passes.run()
    await passes.worker.stop()
    keeper = Keeper(archive.state / FOLDER)
    good = {seq: keeper.get(seq, put) for seq, put in archive.puts.items()}
    with keeper._kv.read() as txn:
        rows = {table: dict(txn.scan(table)) for table in ("heads", "firsts")}
    for table, found in rows.items():
        key, raw = max(found.items())
        digest, *rest, data = msgspec.msgpack.decode(raw)
        for bit in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            changed = msgspec.msgpack.encode([digest, *rest, bytes(flipped)])
            keeper._kv.update(lambda txn, table=table, key=key, changed=changed: txn.put(table, key, changed))
            for seq, put in archive.puts.items():
                with contextlib.suppress(zlib.error):
                    assert keeper.get(seq, put) in (None, good[seq])
        keeper._kv.update(lambda txn, table=table, key=key, raw=raw: txn.put(table, key, raw))
    keeper.close()


@pytest.mark.parametrize("damage", ["row", "first", "pages", "cut"])
async def test_damaged_ones_cost_no_answer_and_are_made_anew(
    archive: Archive, passes: Passes, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    hurried(monkeypatch)
    for number in range(1, 60):
        for image in some(5, f"1.2.{number}"):
            archive.store(image)
    asked = {"DetectorID": "D*", "ImageComments": ""}
    expected = await answers(archive, asked)
    await passes.run()
    await passes.worker.stop()
    file = archive.state / FOLDER / DATA_FILE
    if damage == "row":
        keeper = Keeper(archive.state / FOLDER)
        keeper._kv.update(lambda txn: txn.put("heads", key_of(7), b"\xc1"))
        keeper.close()
    elif damage == "first":
        keeper = Keeper(archive.state / FOLDER)
        [(key, raw), *_] = keeper._kv.update(lambda txn: list(txn.scan("firsts")))
        keeper._kv.update(lambda txn: txn.put("firsts", key, raw[:-1] + bytes([raw[-1] ^ 1])))
        keeper.close()
    else:
        size = file.stat().st_size
        with file.open("r+b") as raw:
            if damage == "pages":
                raw.seek(3 * 4096)
                raw.write(b"\xff" * (size - 3 * 4096))
            else:
                raw.truncate(3 * 4096)
    kept = KeptHeads(True)
    assert sorted(await answers(archive, asked, kept)) == sorted(expected)
    task = asyncio.create_task(HeadKeeping(cast(Store, archive), kept).run())
    try:
        kept.doubt()
        await asyncio.to_thread(wait_for, lambda: kept.usable and archive.with_heads == archive.there, "heads anew")
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_the_head_of_a_bad_copy_isnt_kept(archive: Archive, passes: Passes) -> None:
    number = archive.store(some(1, "1.2.1")[0])
    file = archive.volume / "spool" / f"{number}"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert await passes.run() == (0, 0)
    file.write_bytes(good)
    assert await passes.run(start=1) == (1, 0)


async def test_nothing_is_left_of_one_that_was_deleted(archive: Archive, passes: Passes) -> None:
    """Also where it was the one by which the others of its series are compressed."""
    images = some(5, "1.2.1")
    images[0].ImageComments = "SECRET"
    numbers = [archive.store(one) for one in images]
    await passes.run()
    archive.applied += 1
    archive._write(Delete("1.2.1", "1.2.1.1", str(images[0].SOPInstanceUID), "wrong patient", "somebody", 1.0), None)
    await passes.settle()
    assert archive.with_heads == set(numbers[1:])
    await passes.worker.stop()
    keeper = Keeper(archive.state / FOLDER)
    with keeper._kv.read() as txn:
        texts = [zlib.decompress(msgspec.msgpack.decode(value)[-1]) for _, value in txn.scan("firsts")]
    keeper.close()
    assert texts
    assert not any(b"SECRET" in one for one in texts)


async def test_they_make_room_for_what_was_taken(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    hurried(monkeypatch)
    archive.store(some(1, "1.2.1")[0])
    task = asyncio.create_task(HeadKeeping(cast(Store, archive), KeptHeads(True)).run())
    try:
        await asyncio.to_thread(wait_for, lambda: archive.with_heads, "a head")
        archive.reserve_bytes = 1 << 60
        archive.store(some(1, "1.2.2")[0])
        await asyncio.to_thread(wait_for, lambda: not (archive.state / FOLDER).exists(), "room")
        archive.reserve_bytes = 1 << 20
        await asyncio.to_thread(wait_for, lambda: archive.with_heads == archive.there, "heads again")
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
