"""`tools/bench retrieve`: C-GET of one series from one gateway alone, beside dcmqrscp and Orthanc, in turn, on the same
objects: megabytes a second to DCMTK's getscu, which writes files, and to a client that throws the bytes away.
"""

import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import click
from pydicom import Dataset
from pydicom.filereader import read_dataset

from gateway.dicom.dimse import Command, Status, decode_command, encode_response
from gateway.dicom.identifiers import encode_identifier
from gateway.dicom.sop_classes import GET_MODELS, STUDY_ROOT
from tools.benchmarks import peers
from tools.benchmarks.meters import counted, usage
from tools.benchmarks.peers import Server
from tools.benchmarks.store import SAMPLES, renamed, sample
from tools.cli.dicom_client import AssociationFailed, DicomClient, Object, get_command

SYNTAX: Final = "1.2.840.10008.1.2"
GET: Final = next(uid for uid, model in GET_MODELS.items() if model is STUDY_ROOT)
RECEIVE_BYTES: Final = 1 << 20
PDU_HEAD: Final = 6
PDV_HEAD: Final = 6
TIMEOUT_S: Final = 120.0


class Sink(DicomClient):
    """Asks for a series by C-GET and keeps nothing of what comes: only command sets are looked at."""

    def get(self, identifier: bytes) -> tuple[int, int]:
        """(bytes that came, last status)"""
        number = self.contexts[GET, SYNTAX]
        self.send_raw(
            self.pdvs(number, get_command(1, GET), command=True) + self.pdvs(number, identifier, command=False)
        )
        taken, storing = 0, None  # the request whose data set is coming
        for context, control, payload in self._fragments():
            if not control & 1:
                taken += len(payload)
                if control & 2 and storing:
                    self.send_raw(self.pdvs(context, encode_response(storing, Status.SUCCESS), command=True))
                continue
            command = decode_command(bytes(payload))
            if command.field == Command.C_STORE_RQ:
                storing = command
            elif command.status != Status.PENDING:
                return taken, command.status
        raise AssociationFailed("the connection was closed")

    def _fragments(self) -> Iterator[tuple[int, int, memoryview]]:
        """(presentation context, control, payload) of each PDV; the payload is of use until the next one."""
        room = memoryview(bytearray(2 * RECEIVE_BYTES))
        begin = end = 0
        while True:
            while end - begin >= PDU_HEAD and (size := int.from_bytes(room[begin + 2 : begin + 6], "big")) is not None:
                if end - begin < PDU_HEAD + size:
                    break
                if room[begin] != 4:
                    raise AssociationFailed(f"PDU {room[begin]} instead of data")
                at, begin = begin + PDU_HEAD, begin + PDU_HEAD + size
                while at < begin:
                    length = int.from_bytes(room[at : at + 4], "big")
                    yield room[at + 4], room[at + 5], room[at + PDV_HEAD : at + 4 + length]
                    at += 4 + length
            if begin:
                room[: end - begin] = bytes(room[begin:end])
                begin, end = 0, end - begin
            got = self._socket.recv_into(room[end:])
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)  # see `DicomClient._read`
            if not got:
                return
            end += got


def _asked(study: str, series: str) -> bytes:
    identifier = Dataset()
    identifier.QueryRetrieveLevel = "SERIES"
    identifier.StudyInstanceUID, identifier.SeriesInstanceUID = study, series
    return encode_identifier(identifier, SYNTAX)


def _thrown_away(server: Server, item: Object, study: str, series: str) -> tuple[int, float]:
    """(bytes, seconds)"""
    contexts = [(GET, SYNTAX), (item.sop_class, item.transfer_syntax)]
    asked = _asked(study, series)
    with Sink(server.host, server.port, server.ae_title, contexts, TIMEOUT_S, roles=[item.sop_class]) as client:
        begin = time.perf_counter()
        taken, status = client.get(asked)
        took_s = time.perf_counter() - begin
        client.release()
    if status != 0:
        raise click.ClickException(f"{server.name}: status 0x{status:04X}")
    return taken, took_s


def _by_getscu(server: Server, folder: Path, study: str, series: str) -> tuple[int, float]:
    """(bytes, seconds), with the start of the program."""
    made = Path(tempfile.mkdtemp(dir=folder))
    keys = ("QueryRetrieveLevel=SERIES", f"StudyInstanceUID={study}", f"SeriesInstanceUID={series}")
    words = ["getscu", "-S", "+B", "-pdu", "131072", "-aec", server.ae_title, "-od", str(made)]
    for key in keys:
        words += ["-k", key]
    begin = time.perf_counter()
    subprocess.run([*words, server.host, str(server.port)], check=True, capture_output=True, timeout=TIMEOUT_S)
    took_s = time.perf_counter() - begin
    taken = sum(file.stat().st_size for file in made.iterdir())
    shutil.rmtree(made)
    return taken, took_s


@contextmanager
def _servers(base: Path) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(peers.alone(base / "tandem")),
            stack.enter_context(peers.dcmqrscp(base / "dcmqrscp")),
            stack.enter_context(peers.orthanc(base / "orthanc")),
        ]


def _stored(servers: Sequence[Server], item: Object, count: int) -> None:
    for server in servers:
        contexts = [(item.sop_class, item.transfer_syntax)]
        with DicomClient(server.host, server.port, server.ae_title, contexts, TIMEOUT_S) as client:
            label = f"storing, {server.name}"
            with click.progressbar(range(count), label=label, file=sys.stderr) as numbers:
                for number in numbers:
                    if status := client.store(renamed(item, number)):
                        raise click.ClickException(f"{server.name}: status 0x{status:04X}")
            client.release()


def _measured(servers: Sequence[Server], item: Object, count: int, rounds: int, base: Path, counts: Path) -> Any:
    """Client -> server -> median megabytes a second; and CPU milliseconds an object of ours to the one that throws
    away."""
    study, series = uids_of(item)
    clients: dict[str, Callable[[Server], tuple[int, float]]] = {
        "getscu": lambda server: _by_getscu(server, base, study, series),
        "thrown away": lambda server: _thrown_away(server, item, study, series),
    }
    found: dict[str, Any] = {}
    for name, ask in clients.items():
        rates: dict[str, list[float]] = {server.name: [] for server in servers}
        [pid] = servers[0].pids.values()
        cpu: list[float] = []
        with click.progressbar(range(rounds), label=name, file=sys.stderr) as numbers:
            for _ in numbers:
                for server in servers:
                    before = usage(pid, counts)
                    taken, took_s = ask(server)
                    if taken < 0.99 * count * item.length:  # DCMTK writes lengths of groups and items its own way
                        raise click.ClickException(f"{server.name}: {taken} bytes came")
                    rates[server.name].append(taken / 1e6 / took_s)
                    if server is servers[0]:
                        cpu.append(usage(pid, counts).per_object(before, count)["cpu_ms"])
        medians = {server: statistics.median(values) for server, values in rates.items()}
        ours = medians[servers[0].name]
        found[name] = {
            "MB/s": medians,
            "ratios": {server: ours / rate for server, rate in medians.items() if rate != ours},
            "cpu_ms": statistics.median(cpu),
        }
    return found


def uids_of(item: Object) -> tuple[str, str]:
    """Study and Series Instance UID."""
    read = read_dataset(BytesIO(item.data), False, True, stop_when=lambda tag, vr, length: int(tag) > 0x0020000E)
    return str(read.StudyInstanceUID), str(read.SeriesInstanceUID)


@click.command()
@click.option("--count", default=200, show_default=True, help="Objects of the series (DR: a tenth).")
@click.option("--rounds", default=9, show_default=True, help="Of each client with each server, in turn.")
@click.option("--kinds", default="CT,MR", show_default=True, help=f"Of {', '.join(SAMPLES)}.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where all data lie; default: a tmpfs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def retrieve(count: int, rounds: int, kinds: str, folder: Path | None, as_json: bool) -> None:
    """C-GET of a series from one gateway alone, beside dcmqrscp and Orthanc, in turn."""
    if unknown := [kind for kind in kinds.split(",") if kind not in SAMPLES]:
        raise click.BadParameter(f"{unknown[0]} is none of {', '.join(SAMPLES)}", param_hint="--kinds")
    base = Path(tempfile.mkdtemp(prefix="tandem-bench-", dir=folder or "/dev/shm"))
    results: dict[str, Any] = {}
    try:
        with counted(0) as counts, _servers(base) as servers:
            for kind in kinds.split(","):
                item = sample(kind)
                some = max(10, int(count * SAMPLES[kind][2]))
                _stored(servers, item, some)
                results[f"{kind} {item.length / 1e6:.1f} MB"] = _measured(servers, item, some, rounds, base, counts)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if as_json:
        click.echo(json.dumps(results))
        return
    for label, clients in results.items():
        for client, one in clients.items():
            click.echo(f"{label}, {client}: {one['cpu_ms']:.2f} ms of CPU an object")
            for server, rate in one["MB/s"].items():
                ratio = f"   ours / theirs {one['ratios'][server]:.2f}" if server in one["ratios"] else ""
                click.echo(f"  {server:<14}{rate:>8.0f} MB/s{ratio}")
