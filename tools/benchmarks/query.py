"""`tools/bench query`: what a query costs in an archive of many studies, over C-FIND, and a C-STORE beside it.

The archive is synthetic: rows of a catalogue without files; names in several scripts, several studies a patient, three
series a study, each of one instance: how many a series has makes no difference to queries of studies. `--beside` sends
real objects, of one series a study, to ours and to Orthanc instead, and asks both in turn.
"""

import json
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Final

import click
from pydicom import Dataset

from gateway.dicom.identifiers import encode_identifier
from gateway.dicom.sop_classes import FIND_MODELS, STUDY_ROOT
from storage.heads import FOLDER, opened_again
from storage.objects.local_volume import create_marker
from storage.state.catalogue import MADE_BY, Catalogue
from storage.state.kv import DATA_FILE
from storage.state.model import Entry, Location, Put
from tools.benchmarks import peers
from tools.benchmarks.peers import HERE, Server
from tools.benchmarks.start import MAP_BYTES, PORT, Standalone, fill
from tools.benchmarks.store import WARM_UP, latencies, sample
from tools.cli.dicom_client import DicomClient, Object
from tools.lab.pair import AET, wait_for

STUDIES_A_PATIENT: Final = 4
DAYS: Final = 3650
FIRST_DAY: Final = date(2016, 1, 1)
SYNTAX: Final = "1.2.840.10008.1.2"
FIND: Final = next(uid for uid, model in FIND_MODELS.items() if model is STUDY_ROOT)
ROOT: Final = "1.2.826.0.1.3680043.8.498.1234567890123456"
CT: Final = "1.2.840.10008.5.1.4.1.1.2"
ANSWER_S: Final = 600.0
ROUNDS: Final = 5  # of C-STOREs by themselves and beside viewers
STORES: Final = 40  # in each
FIRST: Final = 100  # answers after which a client is content
FAMILY: Final = (
    *("Smith", "Müller", "García", "O'Brien", "Nguyễn", "Kowalski", "Johansson", "van der Berg", "Rossi", "Dubois"),
    *("Silva", "Иванов", "Петров", "Παπαδόπουλος", "Yilmaz", "Cohen", "Haddad", "Singh", "Patel", "Okafor"),
)
GIVEN: Final = ("Anna", "Jörg", "María", "Liam", "Zoë", "Jan", "Åsa", "Luca", "Élodie", "Ольга", "Νίκος", "Ayşe", "Noa")
CHINESE: Final = (("Wang", "王"), ("Li", "李"), ("Zhang", "张"), ("Liu", "刘"), ("Chen", "陈"), ("Yang", "杨"))
CHINESE_GIVEN: Final = (("XiaoDong", "小东"), ("Wei", "伟"), ("Fang", "芳"), ("JianGuo", "建国"), ("Na", "娜"))
WHAT: Final = (
    "CT Thorax",
    "MR Schädel",
    "Röntgen Thorax p.a.",
    "Abdomen complet",
    "胸部平扫",
    "Knee left",
    "Mammographie",
)
KINDS: Final = ("CT", "MR", "CR", "DX", "US", "MG", "NM", "XA")


def named(rng: random.Random, number: int) -> str:
    """One patient of four has a name in Chinese as well; numbers make them many."""
    if rng.random() < 0.25:
        (family, first), (given, second) = rng.choice(CHINESE), rng.choice(CHINESE_GIVEN)
        return f"{family}^{given}{number % 997}={first}^{second}"
    return f"{rng.choice(FAMILY)}{number % 499}^{rng.choice(GIVEN)}"


def synthetic(volume: str, studies: int) -> Iterator[tuple[Entry, Location]]:
    rng, seq = random.Random(1), 0
    for number in range(studies):
        patient = number // STUDIES_A_PATIENT
        of_patient = random.Random(patient)
        day = FIRST_DAY + timedelta(days=number * DAYS // studies)
        study = {
            "PatientID": f"P{patient:07}",
            "PatientName": named(of_patient, patient),
            "PatientBirthDate": f"{of_patient.randrange(1920, 2020)}0{of_patient.randrange(1, 10)}15",
            "PatientSex": of_patient.choice("FM"),
            "StudyInstanceUID": f"{ROOT}.1.{number}",
            "StudyDate": day.strftime("%Y%m%d"),
            "StudyTime": f"{rng.randrange(7, 19):02}{rng.randrange(60):02}{rng.randrange(60):02}",
            "AccessionNumber": f"A{number:08}",
            "StudyID": str(number % 100_000),
            "StudyDescription": rng.choice(WHAT),
            "ReferringPhysicianName": named(rng, rng.randrange(2000)),
            "SpecificCharacterSet": "ISO_IR 192",
        }
        modality = rng.choice(KINDS)
        for series in range(3):
            seq += 1
            uid = f"{ROOT}.2.{number}.{series}"
            keys = {
                **study,
                "SeriesInstanceUID": uid,
                "Modality": "SR" if series == 2 and number % 3 == 0 else modality,
                "SeriesNumber": str(series + 1),
                "SeriesDescription": f"{modality} {series}",
                "InstanceNumber": "1",
                "Rows": "512",
                "Columns": "512",
            }
            put = Put(
                f"{ROOT}.3.{number}.{series}",
                *("1.2.840.10008.5.1.4.1.1.2", study["StudyInstanceUID"], uid, "1.2.840.10008.1.2.1"),
                seq.to_bytes(16, "big"),
                *(526_000, 900),
                keys,
                "CT1",
                1.7e9 + seq,
            )
            place = f"P{patient:07}/{number}/{series}/{seq}.dcm"
            yield Entry(1, seq, put), Location(volume, f"{seq:016x}", place)


def made(folder: Path, studies: int) -> None:
    """A volume, and a catalogue of so many studies."""
    volume = create_marker(folder / "volume")
    catalogue = Catalogue.open(folder / "state" / "catalogue", MAP_BYTES)
    facts: dict[str, Any] = {"promised": 1, "volumes": [volume], "lineage": "bench", **MADE_BY}
    fill(catalogue, synthetic(volume, studies), 3 * studies, facts)
    catalogue.close()


def questions(studies: int, *, files: bool) -> dict[str, list[dict[str, str]]]:
    """Kind of query -> some of that kind, by keyword, all of them for studies but where they say otherwise; `files`:
    also for what only the files say."""
    rng = random.Random(2)
    some = [rng.randrange(studies) for _ in range(10)]
    days = [(FIRST_DAY + timedelta(days=one * DAYS // studies)).strftime("%Y%m%d") for one in some]
    patients = [one // STUDIES_A_PATIENT for one in some]
    names = [named(random.Random(one), one).split("^")[0] for one in patients]
    relational = {"QueryRetrieveLevel": "SERIES"}
    image = {"QueryRetrieveLevel": "IMAGE"}
    of_files: dict[str, list[dict[str, str]]] = {
        "a day with one from the file": [{"StudyDate": day, "ContrastBolusAgent": ""} for day in days],
        "one from the file alone": [{"ContrastBolusAgent": f"agent {one % 100}"} for one in some[:3]],
    }
    return (of_files if files else {}) | {
        "study UID": [{"StudyInstanceUID": f"{ROOT}.1.{one}"} for one in some],
        "patient ID": [{"PatientID": f"P{one // STUDIES_A_PATIENT:07}"} for one in some],
        "accession number": [{"AccessionNumber": f"A{one:08}"} for one in some],
        "series UID": [{**relational, "SeriesInstanceUID": f"{ROOT}.2.{one}.0"} for one in some],
        "SOP instance UID": [{**image, "SOPInstanceUID": f"{ROOT}.3.{one}.0"} for one in some],
        "one day": [{"StudyDate": day} for day in days],
        "day and modality": [{"StudyDate": day, "ModalitiesInStudy": "CT"} for day in days],
        "name prefix": [{"PatientName": f"{name}^*"} for name in names],
        "short name prefix": [{"PatientName": f"{name[:2]}*"} for name in FAMILY[:10]],
        "name in Chinese": [
            {"PatientName": f"={one}^{two}"} for (_, one), (_, two) in zip(CHINESE, CHINESE_GIVEN, strict=False)
        ],
        "part of a name": [
            {"PatientName": f"*{name[1:]}{one % 499}*"} for name, one in zip(FAMILY, some, strict=False)
        ],
        "part of an ID": [{"PatientID": f"*{one // STUDIES_A_PATIENT:07}"} for one in some],
        "part of a description": [{"StudyDescription": "*complet*"}, {"StudyDescription": "*平扫"}],
        "month and physician": [
            {"StudyDate": f"{day[:6]}01-{day[:6]}28", "ReferringPhysicianName": "Smith*"} for day in days
        ],
        "birth date alone": [{"PatientBirthDate": f"19{60 + one % 40}0115"} for one in some[:3]],
        "a day with counts": [
            {
                "StudyDate": day,
                "NumberOfStudyRelatedInstances": "",
                "NumberOfStudyRelatedSeries": "",
                "ModalitiesInStudy": "",
            }
            for day in days
        ],
    }


RETURNED: Final = (
    *("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "StudyDate", "StudyTime", "AccessionNumber"),
    *("StudyDescription", "ModalitiesInStudy"),
)


def encoded(asked: dict[str, str]) -> bytes:
    identifier = Dataset()
    identifier.SpecificCharacterSet = "ISO_IR 192"
    for keyword, text in {"QueryRetrieveLevel": "STUDY", **dict.fromkeys(RETURNED, ""), **asked}.items():
        setattr(identifier, keyword, text or None)
    return encode_identifier(identifier, SYNTAX)


def _timed(client: DicomClient, context: int, identifier: bytes) -> tuple[int, int, float, float]:
    """(answers, last status, seconds until the first FIRST of them, seconds for all)"""
    heard: list[float] = []
    begin = time.perf_counter()
    count, status = client.find(context, FIND, identifier, lambda _: heard.append(time.perf_counter()))
    end = time.perf_counter()
    return count, status, (heard[FIRST - 1] if len(heard) >= FIRST else end) - begin, end - begin


@dataclass
class Heard:
    """Of one kind of query."""

    all_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    statuses: set[str] = field(default_factory=set)

    @property
    def row(self) -> dict[str, Any]:
        return {
            "ms": median(self.all_ms),
            f"first {FIRST}, ms": median(self.first_ms),
            "answers": median(self.counts),
            "statuses": sorted(self.statuses),
        }


def measure(servers: Sequence[Server], studies: int, *, files: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """Server -> kind of query -> median milliseconds, median number of answers, and the statuses that came; the servers
    in turn."""
    found: dict[str, dict[str, Heard]] = {server.name: {} for server in servers}
    with ExitStack() as stack:
        clients = {
            one.name: stack.enter_context(DicomClient(one.host, one.port, one.ae_title, [(FIND, SYNTAX)], ANSWER_S))
            for one in servers
        }
        for kind, asked in questions(studies, files=files).items():
            for one in asked:
                for name, client in clients.items():
                    heard = found[name].setdefault(kind, Heard())
                    count, status, first_s, all_s = _timed(client, client.contexts[FIND, SYNTAX], encoded(one))
                    heard.all_ms.append(all_s * 1000)
                    heard.first_ms.append(first_s * 1000)
                    heard.counts.append(count)
                    heard.statuses.add(f"0x{status:04X}")
    return {name: {kind: heard.row for kind, heard in kinds.items()} for name, kinds in found.items()}


# -- beside others -----------------------------------------------------------------------------------------------------


def objects(studies: int) -> Iterator[Object]:
    """A small object of each study, of its first series."""
    for entry, _ in islice(synthetic("", studies), 0, None, 3):
        put = entry.operation
        assert isinstance(put, Put)
        image = Dataset()
        for keyword, text in put.keys.items():
            setattr(image, keyword, int(text) if keyword in ("Rows", "Columns") else text)
        image.SOPClassUID, image.SOPInstanceUID = put.sop_class, put.sop_instance
        image.Rows = image.Columns = 8
        image.ContrastBolusAgent = f"agent {entry.seq // 3 % 100}"  # which the catalogue hasn't
        image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, "MONOCHROME2", 0
        image.BitsAllocated, image.BitsStored, image.HighBit = 16, 12, 11
        image.PixelData = bytes(128)
        yield Object(put.sop_class, put.sop_instance, SYNTAX, encode_identifier(image, SYNTAX))


def sent(servers: Sequence[Server], studies: int) -> None:
    """The same studies to all."""
    with ExitStack() as stack:
        contexts = [(CT, SYNTAX)]
        clients = {
            one.name: stack.enter_context(DicomClient(one.host, one.port, one.ae_title, contexts, ANSWER_S))
            for one in servers
        }
        with click.progressbar(objects(studies), length=studies, label="storing", file=sys.stderr) as bar:
            for one in bar:
                for name, client in clients.items():
                    if status := client.store(one):
                        raise click.ClickException(f"{name}: status 0x{status:04X}")


def kept_heads(folder: Path, count: int) -> float:
    """Bytes an instance, when all are kept."""

    def all_there() -> bool:
        heads = opened_again(None, folder)
        found = heads.count if heads else 0
        if heads:
            heads.close()
        return found >= count

    wait_for("the heads to be kept", all_there, ANSWER_S)
    return (folder / DATA_FILE).stat().st_blocks * 512 / count


def _looks(server: Server, number: int, over: Any) -> None:
    """A viewer that goes through all studies again and again."""
    with DicomClient(server.host, server.port, server.ae_title, [(FIND, SYNTAX)], ANSWER_S) as client:
        asked = encoded({"PatientSex": f"O{number}"})  # which no index has, and no patient
        while not over.is_set():
            client.find(client.contexts[FIND, SYNTAX], FIND, asked)


def beside_viewers(servers: Sequence[Server], viewers: int) -> dict[str, dict[str, float]]:
    """Server -> median milliseconds of a C-STORE of a CT image by itself and while viewers scan, alternately."""
    item, number = sample("CT"), 0
    times: dict[str, dict[str, list[float]]] = {one.name: {"by itself": [], "beside viewers": []} for one in servers}
    forked = multiprocessing.get_context("fork")
    with click.progressbar(range(ROUNDS), label="storing beside viewers", file=sys.stderr) as rounds:
        for _ in rounds:
            for server in servers:
                for name, found in times[server.name].items():
                    over = forked.Event()
                    looking = [
                        forked.Process(target=_looks, args=(server, one, over))
                        for one in range(viewers if name == "beside viewers" else 0)
                    ]
                    for one in looking:
                        one.start()
                    time.sleep(1.0)  # so that they have begun
                    found += latencies([server], item, STORES, "", first=number)[server.name]
                    number += STORES + WARM_UP
                    over.set()
                    for one in looking:
                        one.join(ANSWER_S)
    return {server: {name: median(found) for name, found in kinds.items()} for server, kinds in times.items()}


@contextmanager
def _made(
    base: Path, studies: int, beside: bool, orthanc_root: Path | None
) -> Iterator[tuple[list[Server], dict[str, Any]]]:
    """Who is asked, and what there is to say of ours when it has been."""
    facts: dict[str, Any] = {"studies": studies}
    if beside:
        with peers.alone(base / "tandem") as ours, peers.orthanc(base / "orthanc", root=orthanc_root) as theirs:
            sent([ours, theirs], studies)
            facts["bytes of kept heads, an instance"] = kept_heads(base / "tandem" / "data" / "state" / FOLDER, studies)
            yield [ours, theirs], facts
        return
    gateway = Standalone(base)
    try:
        made(base, studies)
        size = (base / "state" / "catalogue" / "data.mdb").stat().st_blocks * 512
        facts["bytes an instance"] = size / (3 * studies)
        gateway.start()
        yield [Server("tandem alone", HERE, PORT, AET, {"gateway": gateway.pid})], facts
        facts["anonymous memory, MB"] = gateway.memory_mb
    finally:
        gateway.end(signal.SIGTERM)


@click.command()
@click.option("--studies", default=20_000, show_default=True, help="How many the archive has.")
@click.option("--beside", is_flag=True, help="Send them to ours and to Orthanc, and ask both in turn.")
@click.option("--orthanc-root", type=click.Path(path_type=Path), help="Another Debian's files that have the Orthanc.")
@click.option("--viewers", default=4, show_default=True, help="That scan while a modality stores; 0: no such part.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where to write; default: a tmpfs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def query(
    studies: int, beside: bool, orthanc_root: Path | None, viewers: int, folder: Path | None, as_json: bool
) -> None:
    """What each kind of query costs over C-FIND in an archive of many studies, and a C-STORE beside them."""
    base = Path(tempfile.mkdtemp(prefix="tandem-bench-", dir=folder or "/dev/shm"))
    base.chmod(0o755)
    try:
        with _made(base, studies, beside, orthanc_root) as (servers, facts):
            found = measure(servers, studies, files=beside)
            stores = beside_viewers(servers, viewers) if viewers else {}
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if as_json:
        click.echo(json.dumps({**facts, "queries": found, "C-STORE beside viewers, ms": stores}))
        return
    click.echo(", ".join(f"{name}: {value:.0f}" for name, value in facts.items()))
    for server, kinds in found.items():
        click.echo(server)
        for kind, one in kinds.items():
            said = f"{one[f'first {FIRST}, ms']:>10.2f} ms for the first {FIRST}{one['answers']:>8.0f} answers"
            theirs = [kinds[kind]["ms"] for name, kinds in found.items() if name != server]
            ratio = f"   {one['ms'] / theirs[0]:.2f} of the other's" if theirs else ""
            click.echo(f"  {kind:<24}{one['ms']:>10.2f} ms{said}  {' '.join(one['statuses'])}{ratio}")
    for server, ms in stores.items():
        alone, beside_ms = ms["by itself"], ms["beside viewers"]
        click.echo(
            f"{server}: C-STORE {alone:.2f} ms, {beside_ms:.2f} beside {viewers} viewers: x {beside_ms / alone:.2f}"
        )
