"""Every file of pydicom-data and of pydicom's and pynetdicom's own tests: had back bit for bit, or refused."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pydicom.data
import pynetdicom.tests
import pytest
from pydicom import Dataset
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelGet

from gateway.dicom.sop_classes import STORAGE_CLASSES
from tests.builders import item
from tests.conftest import Gateway
from tools.cli.dicom_client import Object
from tools.cli.dicom_files import NotAnInstance, read_object
from tools.lab.samples import data_folder

FOLDERS = {
    "pydicom-data": data_folder(),
    "pydicom": Path(pydicom.data.__file__).parent,
    "pynetdicom": Path(pynetdicom.tests.__file__).parent / "dicom_files",
}
CONTEXTS_MAX = 120


def all_objects() -> tuple[list[dict[str, Object]], int]:
    """Rounds of file -> object, and how many files are no composite instances. Encodings of one instance under the same
    UID are in different rounds: each takes the place of the one before."""
    rounds: list[dict[str, Object]] = []
    times: Counter[str] = Counter()
    left_out = 0
    for name, folder in FOLDERS.items():
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")):
            try:
                found = read_object(path)
            except NotAnInstance:
                left_out += 1
                continue
            number = times[found.sop_instance]
            times[found.sop_instance] += 1
            if number == len(rounds):
                rounds.append({})
            rounds[number][f"{name}/{path.relative_to(folder)}"] = found
    return rounds, left_out


def sent(gateway: Gateway, item: Object) -> int | None:
    """The status, None where no presentation context was accepted."""
    try:
        with gateway.client(item) as client:
            return client.store(item)
    except KeyError:
        return None


def retrieved(gateway: Gateway, items: list[Object]) -> dict[str, bytes]:
    """SOP Instance UID -> data set as it came, by C-GET."""
    got: dict[str, bytes] = {}

    def keep(event: evt.Event) -> int:
        got[event.request.AffectedSOPInstanceUID] = event.request.DataSet.getvalue()
        return 0

    kinds = sorted({(item.sop_class, item.transfer_syntax) for item in items})
    for at in range(0, len(kinds), CONTEXTS_MAX):
        part = kinds[at : at + CONTEXTS_MAX]
        wanted = [item for item in items if (item.sop_class, item.transfer_syntax) in part]
        ae = AE()
        ae.add_requested_context(StudyRootQueryRetrieveInformationModelGet)
        for sop_class, syntax in part:
            ae.add_requested_context(sop_class, syntax)
        roles = [build_role(sop_class, scp_role=True) for sop_class in {sop_class for sop_class, _ in part}]
        association = ae.associate(
            "127.0.0.1", gateway.port, ae_title="TANDEM", ext_neg=roles, evt_handlers=[(evt.EVT_C_STORE, keep)]
        )
        assert association.is_established
        asked = Dataset()
        asked.QueryRetrieveLevel = "IMAGE"
        asked.SOPInstanceUID = [item.sop_instance for item in wanted]
        statuses = [
            status.Status for status, _ in association.send_c_get(asked, StudyRootQueryRetrieveInformationModelGet)
        ]
        association.release()
        assert statuses[-1] == 0, hex(statuses[-1])
    return got


@pytest.mark.timeout(600)
def test_every_file_comes_back_bit_for_bit_or_is_refused(
    new_gateway: Callable[..., Gateway], capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = new_gateway(TANDEM__STORAGE__DUPLICATES='"replace"')
    rounds, left_out = all_objects()
    statuses: dict[str, int | None] = {}
    different, kept = [], set()
    for files in rounds:
        answers = {file: sent(gateway, item) for file, item in files.items()}
        stored = [files[file] for file, status in answers.items() if status == 0]
        got = retrieved(gateway, stored)
        different += [item.sop_instance for item in stored if got.get(item.sop_instance) != item.data]
        kept |= {item.sop_instance for item in stored}
        statuses |= answers
        for file, status in answers.items():
            is_storage = files[file].sop_class in STORAGE_CLASSES
            assert status in (0, 0xA900, 0xC000) or (status is None and not is_storage), f"{file}: {status}"
    with capsys.disabled():
        print("\n" + table(statuses, left_out))
    assert not different
    assert sum(status == 0 for status in statuses.values()) > 220
    assert gateway.status()["instances"] == len(kept)


def table(statuses: dict[str, int | None], left_out: int) -> str:
    lines = [f"{'from':14}{'stored, same bytes':>20}{'refused':>10}"]
    for name in FOLDERS:
        mine = [status for file, status in statuses.items() if file.startswith(f"{name}/")]
        good = sum(status == 0 for status in mine)
        lines.append(f"{name:14}{good:>20}{len(mine) - good:>10}")
    for file, status in statuses.items():
        if status is None:
            lines.append(f"  no presentation context (not a storage class): {file}")
        elif status:
            lines.append(f"  refused 0x{status:04X}: {file}")
    return "\n".join([*lines, f"  left out, not a composite instance: {left_out} files"])


def element(tag: int, vr: str, value: bytes) -> bytes:
    head = (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little") + vr.encode()
    if vr in ("OB", "UN"):
        return head + bytes(2) + len(value).to_bytes(4, "little") + value
    return head + len(value).to_bytes(2, "little") + value


ITEM, ITEM_END = bytes.fromhex("feff00e0ffffffff"), bytes.fromhex("feff0de000000000")
SEQUENCE_END = bytes.fromhex("feffdde000000000")
UNDEFINED = b"\xff" * 4
ODD = {
    "wrong group length": lambda data: element(0x00080000, "UL", (9999).to_bytes(4, "little")) + data,
    "odd length": lambda data: data.replace(element(0x00100020, "LO", b"T1"), element(0x00100020, "LO", b"T12")),
    "undefined lengths": lambda data: data.replace(
        element(0x00100020, "LO", b"T1"),
        element(0x00100020, "LO", b"T1")
        + bytes.fromhex("10000210") + b"SQ" + bytes(2) + UNDEFINED
        + ITEM + element(0x00100020, "LO", b"T2") + ITEM_END + SEQUENCE_END,
    ),
    "trailing padding": lambda data: data + element(0xFFFCFFFC, "OB", bytes(6)),
    "private elements without creator": lambda data: data.replace(
        element(0x00100020, "LO", b"T1"), element(0x00100020, "LO", b"T1") + element(0x00110099, "UN", b"\1\2\3")
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_odd_data_sets_are_kept_as_they_are(gateway: Gateway, kind: str) -> None:
    plain = item()
    odd = Object(plain.sop_class, plain.sop_instance, plain.transfer_syntax, ODD[kind](plain.data))
    assert odd.data != plain.data
    assert sent(gateway, odd) == 0
    assert retrieved(gateway, [odd]) == {odd.sop_instance: odd.data}
