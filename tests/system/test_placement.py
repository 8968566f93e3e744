"""Both nodes put a study on one of their disks, and several studies at once on all of them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydicom.uid import generate_uid

from tests.builders import item
from tests.conftest import wait_for
from tests.system.conftest import NODES, VOLUMES
from tools.cli.dicom_client import DicomClient, Object
from tools.lab.network import VIP, inside
from tools.lab.pair import AET, DICOM_PORT, Lab
from tools.lab.samples import archived

SIZES = (2_000, 300_000, 600_000, 2_000_000)  # held back; streamed; streamed and in the log; written as they come
EACH = 3


def test_studies_at_once_are_spread_and_each_is_together(lab: Lab) -> None:
    objects = {
        study: [item(StudyInstanceUID=study, PixelData=bytes(size)) for size in SIZES for _ in range(EACH)]
        for study in (str(generate_uid()) for _ in range(2 * VOLUMES))
    }

    def send(found: list[Object]) -> list[int]:
        contexts = [(one.sop_class, one.transfer_syntax) for one in found]
        with DicomClient(VIP, DICOM_PORT, AET, contexts, 120) as client:
            return [client.store(one) for one in found]

    with inside("client"), ThreadPoolExecutor(len(objects)) as pool:
        assert {status for found in pool.map(send, objects.values()) for status in found} == {0}
    for node in NODES:
        uids = {one.sop_instance for found in objects.values() for one in found}
        wait_for(lambda node=node, uids=uids: uids <= archived(lab.volumes(node)).keys(), f"all files on {node}", 120)
        files = archived(lab.volumes(node))
        where = {uid: {_volume(lab, node, files[one.sop_instance]) for one in found} for uid, found in objects.items()}
        assert all(len(volumes) == 1 for volumes in where.values()), where
        assert len(set().union(*where.values())) == VOLUMES, where


def _volume(lab: Lab, node: str, file: Path) -> Path:
    return next(volume for volume in lab.volumes(node) if volume in file.parents)
