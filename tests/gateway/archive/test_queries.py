"""Query processes: what they answer, and what becomes of a query when one ends, hangs, or has an old catalogue."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import cast

import pytest
from pydicom import Dataset

from conf.settings import DicomSettings
from gateway.archive import queries
from gateway.archive.answers import Query
from gateway.archive.asked import USED, Asked
from gateway.archive.find import Extended
from gateway.archive.keeping import KeptHeads
from gateway.archive.queries import Queries, QueryFailed, QueryProcess, Running
from gateway.archive.query_process import BATCH
from gateway.dicom.identifiers import BadQuery, encode_identifier
from gateway.dicom.sop_classes import STUDY_ROOT
from storage.state.catalogue import MADE_BY, Batch, Catalogue
from storage.state.kv import CatalogueDamaged
from storage.store import NotServing, Store
from tests.builders import dataset, encoded
from tests.storage.state.test_transfer import taken
from tools.benchmarks.query import FIND, ROOT, SYNTAX, synthetic

STUDIES = 400
MAP_BYTES = 64 << 10  # so that it grows again and again


class Archive:
    """As much of a store as queries need: a catalogue that one process writes and others read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "catalogue"
        self.catalogue = Catalogue.open(self.folder, MAP_BYTES)
        self.catalogue.write(Batch(meta={"lineage": "x", "promised": 1, **MADE_BY}))
        self.rows, self.stored = synthetic("volume", 10_000), 0
        self.unreadable: set[int] = set()
        self.beginnings: list[tuple[int, int]] = []
        self.head = b""
        self.fails: Exception | None = None

    def store(self, studies: int) -> None:
        some = list(islice(self.rows, 3 * studies))
        self.catalogue.write(Batch(appends=some, applies=some))
        self.stored += studies

    def for_other_processes(self) -> tuple[str, int]:
        return str(self.folder), self.catalogue.generation

    def forget_readers(self) -> None:
        self.catalogue.kv.forget_readers()

    async def beginning(self, seq: int, bytes_max: int) -> bytes:
        self.beginnings.append((seq, bytes_max))
        if self.fails:
            raise self.fails
        return self.head[:bytes_max]


class Asking:
    def __init__(self, archive: Archive, processes: Queries) -> None:
        self.archive, self.processes = archive, processes

    def begin(self, **keys: str) -> Running:
        identifier = Dataset()
        for keyword, text in {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": "", **keys}.items():
            setattr(identifier, keyword, text)
        settings = tuple(getattr(DicomSettings(), name) for name in USED)
        catalogue = self.archive.for_other_processes()
        raw = encode_identifier(identifier, SYNTAX)
        unreadable = tuple(self.archive.unreadable) if len(self.archive.unreadable) < 5 else None
        asked = Asked(raw, SYNTAX, FIND, (True, False, False), settings, catalogue, unreadable, True)
        return self.processes.begin(asked)

    async def all(self, running: Running) -> list[bytes]:
        found: list[bytes] = []
        try:
            while not running.ended:
                found += (await running.more()).answers
        finally:
            running.close()
        return found

    async def pid(self) -> int:
        """Of a process that is there."""
        await self.all(self.begin(StudyInstanceUID="1.2.3"))
        process = self._process._worker._process
        assert process is not None
        return process.pid

    @property
    def _process(self) -> QueryProcess:
        return self.processes._processes[0]


@pytest.fixture
async def asking(tmp_path: Path) -> AsyncIterator[Asking]:
    archive = Archive(tmp_path)
    archive.store(STUDIES)
    processes = Queries(cast(Store, archive), 1, KeptHeads(True))
    yield Asking(archive, processes)
    await processes.stop()
    archive.catalogue.close()


QUESTIONS: list[dict[str, str]] = [
    {},
    {"PatientName": "*a*", "PatientID": "", "ModalitiesInStudy": "CT", "NumberOfStudyRelatedInstances": ""},
    {"StudyInstanceUID": f"{ROOT}.1.7"},
    {"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": f"{ROOT}.1.7", "SeriesInstanceUID": "", "Modality": ""},
    {"QueryRetrieveLevel": "IMAGE", "StudyInstanceUID": f"{ROOT}.1.7", "SOPInstanceUID": ""},
    {"StudyDate": "20160101-20170101", "StudyTime": "", "ReferringPhysicianName": ""},
]


@pytest.mark.parametrize("keys", QUESTIONS)
@pytest.mark.parametrize("many", [False, True])
async def test_the_answers_are_those_of_a_search_in_process(asking: Asking, keys: dict[str, str], many: bool) -> None:
    asking.archive.unreadable = {20} | (set(range(2000, 2010)) if many else set())
    identifier = Dataset()
    for keyword, text in {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": "", **keys}.items():
        setattr(identifier, keyword, text)
    extended = Extended(relational=True)
    query = Query(
        identifier,
        STUDY_ROOT,
        DicomSettings(),
        extended,
        asking.archive.catalogue,
        lambda _: None,
        [20].__contains__,
    )
    expected = [query.encoded(row, SYNTAX) for row in query.matches() if row is not None]
    assert expected
    assert await asking.all(asking.begin(**keys)) == expected


async def test_what_was_written_before_is_found_while_the_map_grows(asking: Asking) -> None:
    for _ in range(6):
        asking.archive.store(200)
        assert len(await asking.all(asking.begin())) == asking.archive.stored


async def test_many_at_once_take_turns(asking: Asking) -> None:
    running = [asking.begin() for _ in range(8)]
    found = await asyncio.gather(*map(asking.all, running))
    assert [len(one) for one in found] == [STUDIES] * 8
    assert asking._process.running == 0


async def test_a_process_that_ends_before_the_first_answer_is_tried_again(asking: Asking) -> None:
    os.kill(await asking.pid(), signal.SIGKILL)
    assert len(await asking.all(asking.begin())) == STUDIES


async def test_one_that_ends_in_the_middle_ends_its_queries_and_no_others(asking: Asking) -> None:
    pid = await asking.pid()
    begun = asking.begin()
    assert (await begun.more()).answers
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(QueryFailed):
        while not begun.ended:
            await begun.more()
    begun.close()
    assert len(await asking.all(asking.begin())) == STUDIES


async def test_one_that_hangs_is_killed(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = await asking.pid()
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(queries, "HUNG_S", 1.0)
    begun = asking.begin(StudyInstanceUID=f"{ROOT}.1.3")
    with pytest.raises((QueryFailed, ProcessLookupError)):
        await begun.more()  # on a slow machine the new one may take longer than that as well
        os.kill(pid, 0)
    begun.close()
    monkeypatch.setattr(queries, "HUNG_S", 60.0)
    assert len(await asking.all(asking.begin())) == STUDIES


async def test_whoever_goes_in_the_middle_takes_nobody_along(asking: Asking) -> None:
    pid, others = await asking.pid(), asking.begin()
    assert (await others.more()).answers
    gone = asking.begin()
    task = asyncio.create_task(gone.more())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gone.close()
    assert len(await asking.all(others)) == STUDIES - BATCH
    assert await asking.pid() == pid


async def test_another_catalogue_is_opened_when_it_has_taken_the_place(asking: Asking, tmp_path: Path) -> None:
    other = Archive(tmp_path / "other")
    other.store(STUDIES + 5)
    begun = asking.begin()
    assert (await begun.more()).answers
    asking.archive.catalogue.become(*taken(other.catalogue, asking.archive.catalogue), nullcontext)
    with pytest.raises(NotServing):
        await begun.more()
    begun.close()
    assert len(await asking.all(asking.begin())) == STUDIES + 5
    other.catalogue.close()


@pytest.mark.parametrize("error", [CatalogueDamaged("x"), OSError(5, "x"), MemoryError()])
async def test_what_the_gateway_cant_say_mixes_up_nothing(asking: Asking, error: Exception) -> None:
    """No answer is ever taken for that of another query."""
    asking.archive.fails = error
    assert await asking.all(asking.begin(StudyInstanceUID=f"{ROOT}.1.3", DetectorID="D1")) == []
    asking.archive.fails = None
    found = await asking.all(asking.begin(StudyInstanceUID=f"{ROOT}.1.7"))
    assert len(found) == 1
    assert f"{ROOT}.1.7".encode() in found[0]


async def test_nothing_is_started_for_who_is_gone(asking: Asking) -> None:
    pid = await asking.pid()
    begun = asking.begin()
    await begun.more()
    await asking.processes.stop()
    begun.close()
    with pytest.raises(QueryFailed):
        await asking.begin().more()
    await asyncio.sleep(0.1)
    assert not asking._process._worker.running
    assert not Path(f"/proc/{pid}").exists()


async def test_bad_identifiers_are_refused_and_harm_nobody(asking: Asking) -> None:
    pid = await asking.pid()
    for raw in (b"\0", b"\xff" * 100, b"", encode_identifier(Dataset(), SYNTAX)):
        settings = tuple(getattr(DicomSettings(), name) for name in USED)
        catalogue = asking.archive.for_other_processes()
        asked = Asked(raw, SYNTAX, FIND, (False, False, False), settings, catalogue, (), True)
        begun = asking.processes.begin(asked)
        with pytest.raises(BadQuery):
            await begun.more()
        begun.close()
    assert await asking.pid() == pid


@pytest.mark.parametrize("pixels", [100, 1 << 20])
@pytest.mark.parametrize("comment", ["short", "x" * 100_000])
async def test_attributes_outside_the_catalogue_come_from_the_file(asking: Asking, pixels: int, comment: str) -> None:
    """Of which no more is read than its attributes take."""
    image = dataset(DetectorID="ROOM 3", ImageComments=comment)
    image.PixelData = bytes(pixels)
    asking.archive.head = bytes(900) + encoded(image)
    found = await asking.all(asking.begin(StudyInstanceUID=f"{ROOT}.1.3", DetectorID="ROOM*"))
    assert len(found) == 1
    assert b"ROOM 3" in found[0]
    assert len(asking.archive.beginnings) == (1 if comment == "short" else 2)
    assert not await asking.all(asking.begin(StudyInstanceUID=f"{ROOT}.1.3", DetectorID="ROOM 4"))
