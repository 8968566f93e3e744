"""`tools/bench store`: C-STORE to the pair or to one gateway alone, beside Orthanc (and storescp), in turn, on the same
objects: latency of one association, or objects a second of several, with each process's CPU time and syncs an object.
"""

import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Final

import click
from pydicom import Dataset, dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from tools.benchmarks import peers
from tools.benchmarks.meters import counted, usage
from tools.benchmarks.peers import Server
from tools.cli.dicom_client import DicomClient, Object
from tools.lab.network import inside
from tools.lab.pair import Lab

WARM_UP: Final = 10
ROUNDS: Final = 5  # of objects a second
TIMEOUT_S: Final = 120.0
SAMPLES: Final = {
    "CT": ("693_UNCI.dcm", 524288, 1.0),  # file of pydicom-data, bytes of pixels, share of --count
    "MR": ("MR2_UNCR.dcm", 131072, 1.0),
    "DR": ("RG1_UNCR.dcm", 18 << 20, 0.1),
}


def sample(kind: str) -> Object:
    """A real object of pydicom-data brought to the kind's length, explicit VR little endian."""
    import data_store

    pattern, size, _ = SAMPLES[kind]
    path = next(Path(data_store.__path__[0]).rglob(pattern))
    source = dcmread(path)
    source.remove_private_tags()
    side = int((size / 2) ** 0.5)
    dataset = Dataset()
    for element in source:
        if element.tag.group < 0x0028:
            dataset.add(element)
    dataset.Rows = dataset.Columns = side
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = bytes(range(256)) * (side * side * 2 // 256 + 1)
    dataset.PixelData = dataset.PixelData[: side * side * 2]
    dataset.SOPInstanceUID = generate_uid(prefix="1.2.826.0.1.3680043.8.498.")
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, dataset)
    return Object(str(dataset.SOPClassUID), str(dataset.SOPInstanceUID), str(ExplicitVRLittleEndian), buffer.getvalue())


def renamed(item: Object, number: int) -> Object:
    return item.renamed(item.sop_instance[:-8] + f"{number:08d}")


def _client(server: Server, item: Object) -> DicomClient:
    return DicomClient(server.host, server.port, server.ae_title, [(item.sop_class, item.transfer_syntax)], TIMEOUT_S)


def _store(client: DicomClient, server: Server, item: Object) -> None:
    status = client.store(item)
    if status != 0:
        raise click.ClickException(f"{server.name}: status 0x{status:04X}")


def latencies(
    servers: Sequence[Server], item: Object, count: int, label: str, first: int = 0
) -> dict[str, list[float]]:
    """Milliseconds of each C-STORE on one association, the servers in turn; `first`: number of the first object."""
    found: dict[str, list[float]] = {server.name: [] for server in servers}
    with ExitStack() as stack:
        clients = [stack.enter_context(_client(server, item)) for server in servers]
        with click.progressbar(range(count + WARM_UP), label=label, file=sys.stderr) as numbers:
            for number in numbers:
                fresh = renamed(item, first + number)
                for server, client in zip(servers, clients, strict=True):
                    start = time.perf_counter()
                    _store(client, server, fresh)
                    if number >= WARM_UP:
                        found[server.name].append((time.perf_counter() - start) * 1000)
    return found


def rates(servers: Sequence[Server], item: Object, count: int, assocs: int, label: str) -> dict[str, list[float]]:
    """Objects a second of `assocs` associations at once, the servers in turn, some rounds."""
    found: dict[str, list[float]] = {server.name: [] for server in servers}
    each = max(1, count // (assocs * ROUNDS))
    with click.progressbar(range(ROUNDS), label=label, file=sys.stderr) as rounds:
        for number in rounds:
            for server in servers:
                found[server.name].append(_rate(server, item, number, assocs, each))
    return found


def _rate(server: Server, item: Object, number: int, assocs: int, each: int) -> float:
    forked = multiprocessing.get_context("fork")
    ready, done = forked.Barrier(assocs + 1), forked.Barrier(assocs + 1)
    senders = [
        forked.Process(target=_send, args=(server, item, (number * assocs + sender) * each, each, ready, done))
        for sender in range(assocs)
    ]
    for sender in senders:
        sender.start()
    try:
        ready.wait(TIMEOUT_S)
        start = time.perf_counter()
        done.wait(TIMEOUT_S * 5)
        return assocs * each / (time.perf_counter() - start)
    finally:
        for sender in senders:
            sender.join(TIMEOUT_S)


def _send(server: Server, item: Object, first: int, count: int, ready: Barrier, done: Barrier) -> None:
    try:
        fresh = [renamed(item, number) for number in range(first, first + count)]
        with _client(server, item) as client:
            ready.wait(TIMEOUT_S)
            for one in fresh:
                _store(client, server, one)
            done.wait(TIMEOUT_S)
    except BaseException:
        ready.abort()
        done.abort()
        raise


@contextmanager
def _servers(base: Path, alone: bool, tls: bool) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        if alone:
            yield [
                stack.enter_context(peers.alone(base / "tandem")),
                stack.enter_context(peers.orthanc(base / "orthanc")),
                stack.enter_context(peers.storescp(base / "storescp")),
            ]
            return
        lab = Lab(base / "lab")
        stack.callback(lab.down, keep_data=False)
        lab.up(5.0, 1, tls=tls)
        stack.enter_context(inside("client"))
        yield [peers.pair(lab), stack.enter_context(peers.orthanc(base / "orthanc", "w"))]


def _row(servers: Sequence[Server], item: Object, count: int, assocs: int, label: str, counts: Path) -> dict[str, Any]:
    """What was measured with one kind of object."""
    pids = {name: pid for server in servers for name, pid in server.pids.items()}
    before = {name: usage(pid, counts) for name, pid in pids.items()}
    if assocs > 1:
        found = rates(servers, item, count, assocs, label)
        stored = max(1, count // (assocs * ROUNDS)) * assocs * ROUNDS
    else:
        found = latencies(servers, item, count, label)
        stored = count + WARM_UP
    row: dict[str, Any] = {
        name: {
            "median": statistics.median(values),
            "p10": statistics.quantiles(values, n=10)[0],
            "p90": statistics.quantiles(values, n=10)[8],
        }
        for name, values in found.items()
    }
    ours = row[servers[0].name]["median"]
    row["ratios"] = {server.name: ours / row[server.name]["median"] for server in servers[1:]}
    row["processes"] = {name: usage(pid, counts).per_object(before[name], stored) for name, pid in pids.items()}
    return row


@click.command()
@click.option("--count", default=300, show_default=True, help="Objects of each kind (DR: a tenth).")
@click.option("--assocs", default=1, show_default=True, help="Associations at once; above 1: objects a second.")
@click.option("--sync-ms", default=0, show_default=True, help="Let each sync of every server take so much longer.")
@click.option("--alone", is_flag=True, help="One gateway by itself, beside Orthanc and storescp, instead of the pair.")
@click.option("--kinds", default="CT,MR", show_default=True, help=f"Of {', '.join(SAMPLES)}.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where all data lie; default: a tmpfs.")
@click.option("--tls/--no-tls", default=True, show_default=True, help="Between the nodes and to etcd.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def store(
    count: int, assocs: int, sync_ms: int, alone: bool, kinds: str, folder: Path | None, tls: bool, as_json: bool
) -> None:
    """C-STORE to the pair (two copies) or one gateway alone, beside Orthanc (one copy), in turn."""
    if unknown := [kind for kind in kinds.split(",") if kind not in SAMPLES]:
        raise click.BadParameter(f"{unknown[0]} is none of {', '.join(SAMPLES)}", param_hint="--kinds")
    base = Path(tempfile.mkdtemp(prefix="tandem-bench-", dir=folder or "/dev/shm"))
    base.chmod(0o755)
    results: dict[str, dict[str, Any]] = {}
    try:
        with counted(sync_ms) as counts, _servers(base, alone, tls) as servers:
            for kind in kinds.split(","):
                item, share = sample(kind), SAMPLES[kind][2]
                label = f"{kind} {len(item.data) / 1e6:.1f} MB"
                results[label] = _row(servers, item, max(20, int(count * share)), assocs, label, counts)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if as_json:
        click.echo(json.dumps(results))
        return
    _show(results, "objects/s" if assocs > 1 else "ms")


def _show(results: dict[str, dict[str, Any]], unit: str) -> None:
    for label, row in results.items():
        click.echo(f"{label}: median (p10 to p90), {unit}")
        for name, found in row.items():
            if name not in ("ratios", "processes"):
                ratio = f"   ours / theirs {row['ratios'][name]:.2f}" if name in row["ratios"] else ""
                click.echo(f"  {name:<14} {found['median']:>8.2f} ({found['p10']:.2f} to {found['p90']:.2f}){ratio}")
        for name, used in row["processes"].items():
            click.echo(f"  {name:<14} {used['cpu_ms']:>8.2f} ms of CPU and {used['syncs']:.2f} syncs an object")
