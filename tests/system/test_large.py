"""One multi-frame instance of 1 GB through the pair: memory stays small and both copies are right."""

import struct
from pathlib import Path

import pytest
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage

from tests.builders import dataset, encoded, pdu, pdv
from tests.conftest import wait_for
from tests.system.conftest import other_than, primary_of
from tools.cli.dicom_client import DicomClient, store_command
from tools.lab.network import VIP, inside
from tools.lab.pair import AET, DICOM_PORT, Lab
from tools.lab.samples import archived

FRAMES, SIDE = 1024, 1024
GROWTH_BYTES_MAX = 64 << 20


def memory(pid: int, field: str) -> int:
    """VmRSS or VmHWM in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


@pytest.mark.timeout(600)
def test_one_gigabyte(lab: Lab) -> None:
    made = dataset(SOPClassUID=UltrasoundMultiFrameImageStorage, Rows=SIDE, Columns=SIDE, NumberOfFrames=FRAMES)
    made.BitsAllocated, made.PixelData = 8, b""
    head = encoded(made)[:-12]
    pixel_bytes = FRAMES * SIDE * SIDE
    head += struct.pack("<HH2sxxL", 0x7FE0, 0x0010, b"OW", pixel_bytes)
    pids = {node: lab.pid(node, "gateway") for node in ("a", "b")}
    before = {}
    for node, pid in pids.items():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the high-water mark starts anew
        before[node] = memory(pid, "VmRSS")
    context = [(str(UltrasoundMultiFrameImageStorage), str(ExplicitVRLittleEndian))]
    with inside("client"), DicomClient(VIP, DICOM_PORT, AET, context, 300) as client:
        command = store_command(1, context[0][0], str(made.SOPInstanceUID))
        client.send_raw(client.pdvs(1, command, command=True))
        client.send_raw(pdu(4, pdv(1, 0, head)))
        block = bytes(range(256)) * 256
        packet = pdu(4, pdv(1, 0, block))
        count = pixel_bytes // len(block)
        for _ in range(count - 1):
            client.send_raw(packet)
        client.send_raw(pdu(4, pdv(1, 2, block)))
        assert client.status() == 0
    growth = {node: memory(pid, "VmHWM") - before[node] for node, pid in pids.items()}
    print(f"growth of the gateways' memory: {growth}")
    uid = str(made.SOPInstanceUID)
    primary = primary_of(lab)
    for node in (primary, other_than(primary)):
        path = wait_for(lambda node=node: archived(lab.volumes(node)).get(uid), f"the file on {node}")
        assert path.stat().st_size > pixel_bytes
    assert all(value < GROWTH_BYTES_MAX for value in growth.values()), growth
