"""Reports from the field: each came from somebody's archive, each is answered as the Standard or good sense has it."""

import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable

import pytest
from pydicom import Dataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    generate_uid,
)
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import (
    PatientRootQueryRetrieveInformationModelFind,
    PatientRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
)

from tests.builders import dataset, encoded, item, pdu, pdv
from tests.conftest import Gateway, wait_for
from tests.gateway.dicom.test_associate import CT_CONTEXT, context, request
from tests.gateway.dicom.test_associate import item as association_item
from tools.cli.dicom_client import DicomClient, Object

FIND = str(StudyRootQueryRetrieveInformationModelFind)


def associated(gateway: Gateway, asked: bytes) -> int:
    """Type of the PDU that answers an association request."""
    with gateway.raw() as connection:
        connection.sendall(asked)
        return connection.recv(1)[0]


def with_items(asked: bytes, more: bytes) -> bytes:
    return struct.pack(">BxL", 1, len(asked) - 6 + len(more)) + asked[6:] + more


@pytest.mark.parametrize(
    "asked",
    [
        request(CT_CONTEXT, called=b"TANDEM" + bytes(10)),
        request(CT_CONTEXT, user=bytes.fromhex("5a00000461626364")),
        with_items(request(CT_CONTEXT), association_item(0x60, b"abcd")),
    ],
)
def test_associations_of_real_devices(new_gateway: Callable[..., Gateway], asked: bytes) -> None:
    gateway = new_gateway(TANDEM__DICOM__REQUIRE_CALLED_AET="true")
    assert associated(gateway, asked) == 2


def test_study_uid_behind_the_pixels(gateway: Gateway) -> None:
    made = dataset()
    study = str(made.StudyInstanceUID)
    del made.StudyInstanceUID
    value = study.encode() + b"\0" * (len(study) % 2)
    data = encoded(made) + struct.pack("<HH2sH", 0x20, 0x0D, b"UI", len(value)) + value
    raw = Object(str(made.SOPClassUID), str(made.SOPInstanceUID), str(ExplicitVRLittleEndian), data)
    with gateway.client(raw) as client:
        assert client.store(raw) == 0
    assert [one.StudyInstanceUID for one in found(gateway, StudyInstanceUID=study)] == [study]


def found(gateway: Gateway, level: str = "STUDY", patient_root: bool = False, **keys: object) -> list[Dataset]:
    model = PatientRootQueryRetrieveInformationModelFind if patient_root else StudyRootQueryRetrieveInformationModelFind
    asked = Dataset()
    asked.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(asked, keyword, value)
    ae = AE()
    ae.add_requested_context(model)
    association = ae.associate("127.0.0.1", gateway.port, ae_title="TANDEM")
    assert association.is_established
    answers = list(association.send_c_find(asked, model))
    association.release()
    assert answers[-1][0].Status == 0
    return [answer for _, answer in answers if answer is not None]


def got(
    gateway: Gateway, level: str = "STUDY", syntax: str = ExplicitVRLittleEndian, **keys: object
) -> tuple[Dataset, list[tuple[str, bytes]]]:
    """(final response, SOP Instance UID and bytes of what came)."""
    model = PatientRootQueryRetrieveInformationModelGet
    came: list[tuple[str, bytes]] = []

    def store(event: evt.Event) -> int:
        came.append((str(event.request.AffectedSOPInstanceUID), event.request.DataSet.getvalue()))
        return 0

    asked = Dataset()
    asked.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(asked, keyword, value)
    ae = AE()
    ae.add_requested_context(model)
    ae.add_requested_context(CTImageStorage, syntax)
    association = ae.associate(
        "127.0.0.1",
        gateway.port,
        ae_title="TANDEM",
        ext_neg=[build_role(CTImageStorage, scp_role=True)],
        evt_handlers=[(evt.EVT_C_STORE, store)],
    )
    assert association.is_established
    answers = list(association.send_c_get(asked, model))
    association.release()
    return answers[-1][0], came


def test_a_sequence_that_is_a_text_is_never_changed(gateway: Gateway) -> None:
    """(0012,0064) is a sequence by the dictionary; in implicit VR nothing else says what it is."""
    made = dataset(StudyInstanceUID=generate_uid())
    head = encoded(made, ImplicitVRLittleEndian)
    at = head.index(struct.pack("<HH", 0x20, 0x0D))
    text = b"Siemens Healthcare Header Anonymizer"
    data = head[:at] + struct.pack("<HHL", 0x12, 0x64, len(text)) + text + head[at:]
    raw = Object(str(made.SOPClassUID), str(made.SOPInstanceUID), str(ImplicitVRLittleEndian), data)
    with gateway.client(raw) as client:
        assert client.store(raw) == 0
    final, came = got(gateway, StudyInstanceUID=made.StudyInstanceUID)
    assert final.Status == 0
    assert struct.pack("<HH2sxxL", 0x12, 0x64, b"UN", len(text)) + text in came[0][1]


def test_two_patients_in_one_study(gateway: Gateway) -> None:
    study, series = generate_uid(), generate_uid()
    for patient in ("TMP1", "REAL1"):
        one = item(StudyInstanceUID=study, SeriesInstanceUID=series, PatientID=patient)
        with gateway.client(one) as client:
            assert client.store(one) == 0
    counts = {"NumberOfStudyRelatedInstances": None, "StudyInstanceUID": ""}
    for patient in ("TMP1", "REAL1"):
        answers = found(gateway, patient_root=True, PatientID=patient, **counts)
        assert [one.StudyInstanceUID for one in answers] == [study]
        final, came = got(gateway, PatientID=patient, StudyInstanceUID=study)
        assert final.Status == 0
        assert len(came) == answers[0].NumberOfStudyRelatedInstances == 1
        (answer,) = found(gateway, "PATIENT", True, PatientID=patient, NumberOfPatientRelatedInstances=None)
        assert len(got(gateway, "PATIENT", PatientID=patient)[1]) == answer.NumberOfPatientRelatedInstances == 1
    (answer,) = found(gateway, StudyInstanceUID=study, NumberOfStudyRelatedInstances=None)
    assert len(got(gateway, StudyInstanceUID=study)[1]) == answer.NumberOfStudyRelatedInstances == 2
    assert gateway.status()["conflicts"] == 1


@pytest.mark.parametrize("asked", ["103000-110000", "103000-", "103000", "1030", "10"])
def test_times_are_found_as_far_as_they_say(gateway: Gateway, asked: str) -> None:
    one = item(StudyTime="1030", StudyInstanceUID=generate_uid())
    with gateway.client(one) as client:
        assert client.store(one) == 0
    answers = found(gateway, StudyTime=asked, StudyInstanceUID="")
    assert any(str(answer.StudyTime) == "1030" for answer in answers)


def identifier(**keys: object) -> bytes:
    made = Dataset()
    made.QueryRetrieveLevel = "STUDY"
    for keyword, value in keys.items():
        setattr(made, keyword, value)
    return encoded(made, ImplicitVRLittleEndian)


def find_command(message_id: int, sop_class: str = FIND, field: int = 0x20) -> bytes:
    def element(number: int, value: bytes) -> bytes:
        return struct.pack("<HHL", 0, number, len(value)) + value

    uid = sop_class.encode() + b"\0" * (len(sop_class) % 2)
    body = element(2, uid) + element(0x100, field.to_bytes(2, "little"))
    body += element(0x110, message_id.to_bytes(2, "little")) + element(0x700, b"\0\0") + element(0x800, b"\1\0")
    return element(0, len(body).to_bytes(4, "little")) + body


def test_a_viewer_that_reads_nothing_is_cut(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway(TANDEM__DICOM__MESSAGE_TIMEOUT_S="3.0", TANDEM__DICOM__MAX_ASSOCIATIONS="1")
    long = "x" * 60
    many = [item(StudyInstanceUID=generate_uid(), StudyDescription=long, PatientName=long) for _ in range(300)]
    with gateway.client(*many) as client:
        assert all(client.store(one) == 0 for one in many)
        client.release()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", gateway.port))
    connection.sendall(request(context(1, FIND.encode(), b"1.2.840.10008.1.2")))
    assert connection.recv(4096)[0] == 2
    names = ("StudyDescription", "PatientName", "PatientID", "StudyInstanceUID", "AccessionNumber", "StudyDate")
    asked = identifier(**dict.fromkeys(names, ""))
    for number in range(1, 60):
        try:
            connection.sendall(pdu(4, pdv(1, 3, find_command(number))) + pdu(4, pdv(1, 2, asked)))
        except OSError:
            break
        if number > 3:
            connection.settimeout(1)
    fresh = item()

    def stored() -> bool:
        try:
            with gateway.client(fresh) as client:
                return client.store(fresh) == 0
        except Exception:
            return False

    wait_for(stored, "the slot to be free")
    assert "association.cut" in gateway.log() or "reads nothing" in gateway.log()
    connection.close()


def test_echoes_behind_a_c_get(gateway: Gateway) -> None:
    """Requests that come before a C-GET has ended hold up neither it nor its sub-operations."""
    study, series = generate_uid(), generate_uid()
    many = [item(StudyInstanceUID=study, SeriesInstanceUID=series) for _ in range(5)]
    with gateway.client(*many) as client:
        assert all(client.store(one) == 0 for one in many)
    get = str(StudyRootQueryRetrieveInformationModelGet)
    role = association_item(0x54, struct.pack(">H", len(CTImageStorage)) + CTImageStorage.encode() + b"\0\1")
    contexts = (
        context(1, get.encode(), b"1.2.840.10008.1.2"),
        context(3, CTImageStorage.encode(), ExplicitVRLittleEndian.encode()),
        context(5, b"1.2.840.10008.1.1", b"1.2.840.10008.1.2"),
    )
    with gateway.raw() as connection:
        connection.sendall(request(*contexts, user=role))
        reader = connection.makefile("rb")
        assert read_pdu(reader)[0] == 2
        asked = identifier(StudyInstanceUID=study)
        burst = pdu(4, pdv(1, 3, find_command(1, get, 0x10))) + pdu(4, pdv(1, 2, asked))
        for number in range(6):
            echo = find_command(10 + number, "1.2.840.10008.1.1", 0x30).replace(
                struct.pack("<HHLH", 0, 0x800, 2, 1), struct.pack("<HHLH", 0, 0x800, 2, 0x101)
            )
            burst += pdu(4, pdv(5, 3, echo))
        connection.sendall(burst)
        stored, echoes, final = 0, 0, None
        while echoes < 6 or final is None:
            field, status, message_id, context_id = read_message(reader)
            if field == 0x0001:
                stored += 1
                connection.sendall(pdu(4, pdv(context_id, 3, response(0x8001, message_id))))
            elif field == 0x8030:
                echoes += 1
                assert status == 0
            elif field == 0x8010 and status != 0xFF00:
                final = status
        assert (stored, echoes, final) == (5, 6, 0)


def response(field: int, message_id: int) -> bytes:
    def element(number: int, value: int) -> bytes:
        return struct.pack("<HHLH", 0, number, 2, value)

    body = element(0x100, field) + element(0x120, message_id) + element(0x800, 0x101) + element(0x900, 0)
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def read_pdu(reader: object) -> tuple[int, bytes]:
    head = reader.read(6)  # type: ignore[attr-defined]
    kind, length = struct.unpack(">BxL", head)
    return kind, reader.read(length)  # type: ignore[attr-defined]


def read_message(reader: object) -> tuple[int, int, int, int]:
    """(command field, status, message ID, context) of the next command set; data sets are read over."""
    while True:
        kind, body = read_pdu(reader)
        assert kind == 4, kind
        at, elements, context_id = 0, {}, 0
        while at < len(body):
            length, context_id, control = struct.unpack_from(">LBB", body, at)
            part = body[at + 6 : at + 4 + length]
            at += 4 + length
            inner = 0
            while control & 1 and inner + 8 <= len(part):
                _, number, size = struct.unpack_from("<HHL", part, inner)
                elements[number] = part[inner + 8 : inner + 8 + size]
                inner += 8 + size
        if 0x100 in elements:
            numbers = [int.from_bytes(elements.get(one, b""), "little") for one in (0x100, 0x900, 0x110)]
            return numbers[0], numbers[1], numbers[2], context_id


# -- nothing that comes from outside holds up the others ---------------------------------------------------------------


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def small_elements(count: int) -> bytes:
    """Explicit VR, private, in order."""
    return b"".join(struct.pack("<HH2sH", 9, 0x1000 + number % 0xE000, b"LO", 0) for number in range(count))


def nested(depth: int) -> bytes:
    start = struct.pack("<HH2sxxL", 9, 0x1001, b"SQ", 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    return start * depth + struct.pack("<HHLHHL", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0) * depth


def with_private(more: bytes, syntax: str) -> Object:
    made = dataset(StudyInstanceUID=generate_uid())
    head = encoded(made)
    at = head.index(struct.pack("<HH", 0x10, 0x10))
    data = head[:at] + more + head[at:]
    if syntax == DeflatedExplicitVRLittleEndian:
        data = deflated(data)
    return Object(str(made.SOPClassUID), str(made.SOPInstanceUID), syntax, data)


def store(gateway: Gateway, raw: Object) -> int:
    with gateway.client(raw) as client:
        return client.store(raw)


def find(gateway: Gateway, asked: bytes) -> int:
    with DicomClient("127.0.0.1", gateway.port, "TANDEM", [(FIND, str(ImplicitVRLittleEndian))], 60) as client:
        client.send_raw(client.pdvs(1, find_command(1), command=True) + client.pdvs(1, asked, command=False))
        return client.status()


def named(value: bytes) -> bytes:
    head = identifier(StudyInstanceUID="")
    at = head.index(struct.pack("<HH", 0x20, 0x0D))
    return head[:at] + struct.pack("<HHL", 0x10, 0x10, len(value)) + value + head[at:]


def many_syntaxes(gateway: Gateway) -> int:
    return associated(gateway, request(context(1, b"1.2.840.10008.5.1.4.1.1.2", *[b"1.2.%d" % n for n in range(5000)])))


ATTACKS: dict[str, tuple[Callable[[Gateway], int], set[int]]] = {
    "deflated, small elements": (
        lambda g: store(g, with_private(small_elements(500_000), DeflatedExplicitVRLittleEndian)),
        {0, 0xC000},
    ),
    "small elements": (lambda g: store(g, with_private(small_elements(200_000), ExplicitVRLittleEndian)), {0, 0xC000}),
    "nested, 200": (lambda g: store(g, with_private(nested(200), ExplicitVRLittleEndian)), {0, 0xC000}),
    "nested, 20,000": (lambda g: store(g, with_private(nested(20_000), ExplicitVRLittleEndian)), {0, 0xC000}),
    "nested, deflated": (lambda g: store(g, with_private(nested(5_000), DeflatedExplicitVRLittleEndian)), {0, 0xC000}),
    "stars": (lambda g: find(g, named(b"*a" * 450_000)), {0xA900}),
    "alternatives": (lambda g: find(g, named(b"\\".join(b"a*%06d" % n for n in range(100_000)))), {0xA900}),
    "transfer syntaxes": (many_syntaxes, {2, 7}),
}


class Echoer:
    """A second association that echoes again and again, and how long it waits."""

    def __init__(self, gateway: Gateway) -> None:
        verification = [("1.2.840.10008.1.1", "1.2.840.10008.1.2")]
        self._client = DicomClient("127.0.0.1", gateway.port, "TANDEM", verification, 60)
        self._number = 0

    def once(self) -> float:
        self._number = self._number % 60000 + 1
        echo = find_command(self._number, "1.2.840.10008.1.1", 0x30).replace(
            struct.pack("<HHLH", 0, 0x800, 2, 1), struct.pack("<HHLH", 0, 0x800, 2, 0x101)
        )
        start = time.monotonic()
        self._client.send_raw(self._client.pdvs(1, echo, command=True))
        assert self._client.status() == 0
        return time.monotonic() - start

    def close(self) -> None:
        self._client.close()


@pytest.fixture(scope="module")
def warm(gateway: Gateway) -> Gateway:
    """Worker processes are there."""
    assert store(gateway, with_private(b"", DeflatedExplicitVRLittleEndian)) == 0
    return gateway


@pytest.mark.parametrize("name", ATTACKS)
def test_no_other_waits(warm: Gateway, name: str) -> None:
    """At most 50 ms over a quiet baseline of the same run, the best of many tries: the machine itself stalls."""
    attack, expected = ATTACKS[name]
    echoer = Echoer(warm)
    over: list[float] = []
    try:
        for _ in range(20):
            quiet = max(echoer.once() for _ in range(20))
            answers: list[int] = []
            thread = threading.Thread(target=lambda: answers.append(attack(warm)))  # noqa: B023
            worst = 0.0
            thread.start()
            while thread.is_alive():
                worst = max(worst, echoer.once())
            thread.join()
            assert answers, "the attack wasn't answered"
            assert answers[0] in expected
            over.append(worst - quiet)
            if over[-1] <= 0.05:
                break
    finally:
        echoer.close()
    print(f"{name}: {[round(one * 1000) for one in over]} ms over the quiet baseline")
    assert min(over) <= 0.05
