"""The servers whose C-STORE is measured: ours, and Debian's Orthanc and storescp beside it, each in its own folder."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.lab.network import ADDRESSES, VIP, namespace
from tools.lab.pair import AET, DICOM_PORT, Lab, wait_for

HERE: Final = "127.0.0.1"
ALONE_PORT, ORTHANC_PORT, STORESCP_PORT, DCMQRSCP_PORT = 11112, 4242, 11113, 11114


@dataclass(frozen=True)
class Server:
    """`pids`: what each of its processes is called, and which it is."""

    name: str
    host: str
    port: int
    ae_title: str
    pids: dict[str, int]


def pair(lab: Lab) -> Server:
    """A lab that is up."""
    pids = {}
    for node in ("a", "b"):
        role = "primary" if lab.primary() == node else "standby"
        pids[role] = lab.pid(node, "gateway")
    return Server("tandem pair", VIP, DICOM_PORT, AET, pids)


@contextmanager
def _running(words: Sequence[str], folder: Path, host: str, port: int) -> Iterator[int]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        wait_for(words[0], lambda: answers(host, port), 60)
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)


def answers(host: str, port: int) -> bool:
    """Something listens there."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def alone(folder: Path) -> Iterator[Server]:
    """`tandem gateway --data`."""
    words = [sys.executable, "-m", "tools", "gateway", "--data", str(folder / "data"), "--port", str(ALONE_PORT)]
    with _running(words, folder, HERE, ALONE_PORT) as pid:
        yield Server("tandem alone", HERE, ALONE_PORT, AET, {"gateway": pid})


@contextmanager
def orthanc(folder: Path, member: str = "", root: Path | None = None) -> Iterator[Server]:
    """Debian's Orthanc with its default durability, in a lab member's network or here; `root`: of another Debian, whose
    Orthanc sees `folder` as /mnt."""
    folder.mkdir(parents=True)
    seen = Path("/mnt") if root else folder
    config = {
        "StorageDirectory": str(seen / "db"),
        "IndexDirectory": str(seen / "db"),
        "DicomPort": ORTHANC_PORT,
        "DicomAet": "ORTHANC",
        "DicomCheckCalledAet": False,
        "DicomAlwaysAllowFind": True,
        "DicomAlwaysAllowGet": True,
        "DicomThreadsCount": 16,
        "HttpServerEnabled": False,
        "Plugins": [],
    }
    (folder / "orthanc.json").write_text(json.dumps(config))
    host = ADDRESSES[member] if member else HERE
    inside = ["ip", "netns", "exec", namespace(member)] if member else []
    words = [*inside, "Orthanc", str(seen / "orthanc.json")]
    if root:  # in a mount namespace of its own, which ends with it
        script = 'mount --bind "$1" "$2/mnt" && root=$2 && shift 2 && exec chroot "$root" "$@"'
        words = ["unshare", "--mount", "sh", "-c", script, "sh", str(folder), str(root), *words]
    with _running(words, folder, host, ORTHANC_PORT) as pid:
        yield Server("orthanc", host, ORTHANC_PORT, "ORTHANC", {"orthanc": pid})


@contextmanager
def dcmqrscp(folder: Path) -> Iterator[Server]:
    """DCMTK's archive: files in a folder, and an index of them."""
    made = folder / "db"
    made.mkdir(parents=True)
    config = folder / "dcmqrscp.cfg"
    config.write_text(
        f"NetworkTCPPort = {DCMQRSCP_PORT}\nMaxPDUSize = 131072\nMaxAssociations = 16\n"
        "HostTable BEGIN\nHostTable END\nVendorTable BEGIN\nVendorTable END\n"
        f"AETable BEGIN\nDCMQRSCP {made} RW (200, 16384mb) ANY\nAETable END\n"
    )
    words = ["dcmqrscp", "--config", str(config)]
    with _running(words, folder, HERE, DCMQRSCP_PORT) as pid:
        yield Server("dcmqrscp", HERE, DCMQRSCP_PORT, "DCMQRSCP", {"dcmqrscp": pid})  # each association is a child


@contextmanager
def storescp(folder: Path) -> Iterator[Server]:
    """DCMTK's, which writes files and syncs nothing."""
    made = folder / "received"
    made.mkdir(parents=True)
    words = ["storescp", "--fork", "-pm", "-od", str(made), str(STORESCP_PORT)]
    with _running(words, folder, HERE, STORESCP_PORT) as pid:
        yield Server(
            "storescp", HERE, STORESCP_PORT, "ANY", {"storescp": pid}
        )  # each association is a child of its own
