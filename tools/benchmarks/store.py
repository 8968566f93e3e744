"""`tools/bench store`: C-STORE latency of the pair beside Orthanc's, alternately, on the same objects."""

import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click
from pydicom import Dataset, dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from tools.cli.dicom_client import DicomClient, Object
from tools.lab.network import ADDRESSES, VIP, inside
from tools.lab.pair import AET, DICOM_PORT, Lab, wait_for

ORTHANC_PORT: Final = 4242
WARM_UP: Final = 10
SAMPLES: Final = (("CT 0.5 MB", "693_UNCI.dcm", 524288), ("MR 135 KB", "MR2_UNCR.dcm", 131072))


def sample(pattern: str, size: int) -> Object:
    """A real object of pydicom-data brought to `size` bytes of pixels, explicit VR little endian."""
    import data_store

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
    return item.renamed(item.sop_instance[:-6] + f"{number:06d}")


@contextmanager
def orthanc(folder: Path) -> Iterator[None]:
    """Debian's Orthanc with its default durability, on the witness's address."""
    folder.mkdir(parents=True)
    config = {
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "DicomPort": ORTHANC_PORT,
        "DicomAet": "ORTHANC",
        "DicomCheckCalledAet": False,
        "HttpPort": 8042,
        "HttpServerEnabled": False,
        "Plugins": [],
    }
    (folder / "orthanc.json").write_text(json.dumps(config))
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen(
            ["ip", "netns", "exec", "tandem-w", "Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log
        )
    try:
        with inside("client"):
            wait_for("Orthanc", lambda: _answers(ADDRESSES["w"], ORTHANC_PORT), 60)
        yield
    finally:
        process.terminate()
        process.wait(30)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def measure(clients: dict[str, DicomClient], item: Object, count: int) -> dict[str, list[float]]:
    """Milliseconds of each C-STORE, the targets in turn."""
    found: dict[str, list[float]] = {name: [] for name in clients}
    with click.progressbar(range(count + WARM_UP), label=f"{len(item.data) // 1000} KB", file=sys.stderr) as numbers:
        for number in numbers:
            fresh = renamed(item, number)
            for name, client in clients.items():
                start = time.perf_counter()
                status = client.store(fresh)
                elapsed_ms = (time.perf_counter() - start) * 1000
                if status != 0:
                    raise click.ClickException(f"{name}: status 0x{status:04X}")
                if number >= WARM_UP:
                    found[name].append(elapsed_ms)
    return found


@click.command()
@click.option("--count", default=300, show_default=True, help="Objects of each kind.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where all data lie; default: a tmpfs.")
@click.option("--tls/--no-tls", default=True, show_default=True, help="Between the nodes and to etcd.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def store(count: int, folder: Path | None, tls: bool, as_json: bool) -> None:
    """C-STORE latency: the pair (two copies, index, commit) and Orthanc (one copy, index), alternately."""
    base = Path(tempfile.mkdtemp(prefix="tandem-bench-", dir=folder or "/dev/shm"))
    lab = Lab(base / "lab")
    results: dict[str, dict[str, float]] = {}
    try:
        lab.up(5.0, 1, tls=tls)
        with orthanc(base / "orthanc"), inside("client"):
            for label, pattern, size in SAMPLES:
                item = sample(pattern, size)
                context = [(item.sop_class, item.transfer_syntax)]
                with (
                    DicomClient(VIP, DICOM_PORT, AET, context, 60) as ours,
                    DicomClient(ADDRESSES["w"], ORTHANC_PORT, "ORTHANC", context, 60) as theirs,
                ):
                    found = measure({"tandem": ours, "orthanc": theirs}, item, count)
                medians = {name: statistics.median(values) for name, values in found.items()}
                results[label] = medians | {
                    f"{name} p90": statistics.quantiles(values, n=10)[8] for name, values in found.items()
                }
                results[label]["ratio"] = medians["tandem"] / medians["orthanc"]
    finally:
        lab.down(keep_data=False)
        shutil.rmtree(base, ignore_errors=True)
    if as_json:
        click.echo(json.dumps(results))
        return
    click.echo(f"{'median ms (p90)':<14} {'tandem pair':>18} {'orthanc':>18} {'ratio':>7}")
    for label, row in results.items():
        ours_text = f"{row['tandem']:.2f} ({row['tandem p90']:.2f})"
        theirs_text = f"{row['orthanc']:.2f} ({row['orthanc p90']:.2f})"
        click.echo(f"{label:<15} {ours_text:>18} {theirs_text:>18} {row['ratio']:>7.2f}")
