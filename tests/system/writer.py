"""A modality that never gives up, and the check that everything it heard Success for is there."""

import hashlib
import os
import re
import subprocess
import threading
import time
from itertools import count
from pathlib import Path

from tests.builders import item, uid_of
from tests.conftest import wait_for
from tools.cli.dicom_client import AssociationFailed, DicomClient, Object
from tools.lab.network import NODES, VIP, inside
from tools.lab.pair import AET, DICOM_PORT, Lab
from tools.lab.samples import archived

PIXELS = 40_000
ANSWER_S = 4.0
PAUSE_S = 0.02
ONE_MORE = 999_999


class Writer:
    """Sends small CT images, connects again on any failure, and sends again what was not answered."""

    def __init__(self, lab: Lab, pause_s: float = PAUSE_S, port: int = DICOM_PORT, aet: str = AET) -> None:
        """`pause_s` between two images: without one a quick machine fills the lab's small disks. `port`, `aet`: of
        whom it sends to, at the virtual address."""
        self._lab, self._pause_s, self._port, self._aet = lab, pause_s, port, aet
        template = item(PixelData=bytes(PIXELS), Rows=100, Columns=200)
        self._template = template
        self.acknowledged: dict[str, str] = {}  # SOP Instance UID -> SHA-256 of the data set
        self.answers: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._failed: BaseException | None = None

    def __enter__(self) -> "Writer":
        self._thread.start()
        self.wait_for_more(5)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)
        if self._failed:
            raise self._failed

    def wait_for_more(self, number: int, timeout_s: float = 90.0) -> None:
        """Until so many more are acknowledged."""
        target = len(self.acknowledged) + number
        wait_for(lambda: len(self.acknowledged) >= target or self._failed, f"{number} more Successes", timeout_s)

    def _run(self) -> None:
        try:
            with inside("client"):
                self._send_all()
        except BaseException as error:
            self._failed = error

    def _send_all(self) -> None:
        numbers, fresh = count(), None
        while not self._stop.is_set():
            try:
                context = [(self._template.sop_class, self._template.transfer_syntax)]
                with DicomClient(VIP, self._port, self._aet, context, ANSWER_S) as client:
                    while not self._stop.is_set():
                        fresh = fresh or self._fresh(next(numbers))
                        status = client.store(fresh)
                        self.answers[status] = self.answers.get(status, 0) + 1
                        if status == 0:
                            self.acknowledged[fresh.sop_instance] = hashlib.sha256(fresh.data).hexdigest()
                            fresh = None
                        else:
                            time.sleep(0.1)
                        time.sleep(self._pause_s)
            except (OSError, AssociationFailed):
                time.sleep(0.1)

    def _fresh(self, number: int) -> Object:
        uid = self._template.sop_instance
        return self._template.renamed(uid[:-6] + f"{number:06d}")

    @property
    def study(self) -> str:
        """Study Instance UID of all that it sends."""
        return uid_of(self._template.data, 0x0020_000D)

    @property
    def series(self) -> str:
        """Series Instance UID of all that it sends."""
        return uid_of(self._template.data, 0x0020_000E)

    def send_again(self) -> None:
        """All that was acknowledged, once more; each must be acknowledged once more."""
        numbers = {self._fresh(number).sop_instance: number for number in range(10_000)}
        context = [(self._template.sop_class, self._template.transfer_syntax)]
        with inside("client"), DicomClient(VIP, DICOM_PORT, AET, context, 60) as client:
            for uid in self.acknowledged:
                status = client.store(self._fresh(numbers[uid]))
                assert status == 0, f"0x{status:04X}"

    # -- checks ------------------------------------------------------------------------------------------------

    def files_on(self, node: str) -> dict[str, Path]:
        """SOP Instance UID -> file in the node's readable tree. A dead disk shows nothing."""
        alive = []
        for volume in self._lab.volumes(node):
            try:
                os.listdir(volume / "archive")
            except OSError:
                continue
            alive.append(volume)
        return archived(alive)

    def missing_on(self, node: str) -> list[str]:
        """Acknowledged UIDs without their very bytes in the node's readable tree."""
        held = self.files_on(node)
        return [uid for uid, digest in self.acknowledged.items() if not _same(held.get(uid), digest)]

    def check(self, *nodes: str) -> None:
        """Everything acknowledged is on these nodes' disks with its digest, and C-FIND finds it."""
        for node in nodes or NODES:
            wait_for(lambda node=node: not self.missing_on(node), f"everything acknowledged on {node}")
        found = self.found()
        lost = set(self.acknowledged) - found
        assert not lost, f"{len(lost)} of {len(self.acknowledged)} not found by C-FIND"

    def sent_to(self, address: str) -> int:
        """Status of one more image, sent there once."""
        context = [(self._template.sop_class, self._template.transfer_syntax)]
        with inside("client"), DicomClient(address, DICOM_PORT, AET, context, 60) as client:
            return client.store(self._fresh(ONE_MORE))

    def found(self, address: str = VIP) -> set[str]:
        """SOP Instance UIDs of this writer's series, by DCMTK's findscu."""
        study, series = self.study, self.series
        words = ["findscu", "-v", "-S", "-aec", AET, "-k", "QueryRetrieveLevel=IMAGE", "-k", "SOPInstanceUID"]
        words += ["-k", f"StudyInstanceUID={study}", "-k", f"SeriesInstanceUID={series}", address, str(DICOM_PORT)]
        argv, environment = self._lab.command("client", words)
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
        return set(re.findall(r"\(0008,0018\) UI \[([0-9.]+)", done.stdout + done.stderr))


def _same(path: Path | None, digest: str) -> bool:
    if path is None:
        return False
    try:
        raw = path.read_bytes()
    except OSError:
        return False
    start = 144 + int.from_bytes(raw[140:144], "little")
    return hashlib.sha256(raw[start:]).hexdigest() == digest
