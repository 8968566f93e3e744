"""Query, retrieve and commitment where things go wrong, and what is negotiated; with pynetdicom as the other side."""

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, generate_uid
from pynetdicom import AE, build_context, evt
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    MaximumLengthNotification,
    SOPClassCommonExtendedNegotiation,
    SOPClassExtendedNegotiation,
    UserIdentityNegotiation,
)
from pynetdicom.sop_class import (
    CTImageStorage,
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from conf.settings import DicomSettings
from gateway.archive.users import hash_password
from gateway.dicom.associate import decode_request
from gateway.dimse.negotiate import Negotiated, negotiate
from tests.builders import dataset, encoded
from tests.conftest import Gateway, free_port, wait_for
from tests.interop.clients import Scp
from tools.cli.dicom_client import Object

FIND, MOVE = StudyRootQueryRetrieveInformationModelFind, StudyRootQueryRetrieveInformationModelMove
COUNT = 30
STUDY = "1.2.826.0.1.3680043.8.498.1"
PRIVATE_CLASS = "1.2.826.0.1.3680043.8.498.77"
PORT = free_port()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with one study, and a destination that may be played in any way."""
    here = f'host = "127.0.0.1", port = {PORT}, timeout_s'
    known = f"{{ VIEWER = {{ {here} = 2.0 }}, MANY = {{ {here} = 30.0, associations = 4 }} }}"
    made = Gateway(tmp_path_factory.mktemp("services") / "data", TANDEM__DICOM__DESTINATIONS=known).start()
    images = [dataset(StudyInstanceUID=STUDY, SeriesInstanceUID=f"{STUDY}.1") for _ in range(COUNT)]
    objects = [
        Object(str(one.SOPClassUID), str(one.SOPInstanceUID), str(ExplicitVRLittleEndian), encoded(one))
        for one in images
    ]
    with made.client(objects[0]) as client:
        assert all(client.store(one) == 0 for one in objects)
    yield made
    made.stop()


def associate(gateway: Gateway, *contexts: str, **options: Any) -> Any:
    ae = AE("SOMEBODY")
    for context in contexts:
        ae.add_requested_context(context)
    return ae.associate("127.0.0.1", gateway.port, ae_title="TANDEM", **options)


def keys(level: str = "STUDY", **values: Any) -> Dataset:
    made = Dataset()
    made.QueryRetrieveLevel = level
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def moved(gateway: Gateway, asked: Dataset, to: str = "VIEWER") -> list[tuple[Dataset, Dataset | None]]:
    association = associate(gateway, MOVE)
    answers = list(association.send_c_move(asked, to, MOVE))
    association.release()
    return answers


# -- destinations ------------------------------------------------------------------------------------------------------


def test_move_to_nowhere(full: Gateway) -> None:
    assert moved(full, keys(StudyInstanceUID=STUDY), "NOWHERE")[-1][0].Status == 0xA801


def test_move_of_nothing_is_a_success(full: Gateway) -> None:
    status, _ = moved(full, keys(StudyInstanceUID=generate_uid()))[-1]
    assert (status.Status, status.NumberOfCompletedSuboperations) == (0, 0)


def test_destination_that_is_away(full: Gateway) -> None:
    status, failed = moved(full, keys(StudyInstanceUID=STUDY))[-1]
    assert (status.Status, status.NumberOfFailedSuboperations) == (0xA702, COUNT)
    assert failed is not None
    assert len(failed.FailedSOPInstanceUIDList) == COUNT


def test_destination_that_hangs(full: Gateway) -> None:
    """It takes the connection and says nothing, or takes the association and never answers a C-STORE."""
    with socket.create_server(("127.0.0.1", PORT)):
        assert moved(full, keys(StudyInstanceUID=STUDY))[-1][0].Status == 0xA702
    over = threading.Event()
    with Scp("VIEWER", PORT).takes() as scp:
        scp.before = lambda event: over.wait(30)
        assert moved(full, keys(StudyInstanceUID=STUDY))[-1][0].Status == 0xA702
        over.set()
    assert full.status()["instances"] == COUNT


def test_destination_that_aborts_now_and_then(full: Gateway) -> None:
    """What was on its way then has failed, the rest goes over another association."""
    seen: list[str] = []

    def abort_sometimes(event: evt.Event) -> None:
        seen.append(event.request.AffectedSOPInstanceUID)
        if len(seen) in (5, 11):
            event.assoc.abort()

    with Scp("VIEWER", PORT).takes() as scp:
        scp.before = abort_sometimes
        status, failed = moved(full, keys(StudyInstanceUID=STUDY))[-1]
    assert status.Status == 0xB000
    assert status.NumberOfFailedSuboperations == 2
    assert status.NumberOfCompletedSuboperations == COUNT - 2
    assert failed is not None
    assert set(failed.FailedSOPInstanceUIDList) == {seen[4], seen[10]}


def test_several_associations_at_once(full: Gateway) -> None:
    """Each instance goes over one of them, also where some of them are refused, or break off."""
    seen: list[tuple[object, str]] = []

    def look(event: evt.Event) -> None:
        seen.append((event.assoc, event.request.AffectedSOPInstanceUID))
        time.sleep(0.02)

    with Scp("MANY", PORT).takes() as scp:
        scp.before = look
        assert moved(full, keys(StudyInstanceUID=STUDY), "MANY")[-1][0].Status == 0
        assert len(scp.stored) == len(seen) == COUNT
        assert len({assoc for assoc, _ in seen}) == 4
    seen.clear()
    with Scp("MANY", PORT).takes() as scp:
        scp.before = look
        scp._ae.maximum_associations = 1
        assert moved(full, keys(StudyInstanceUID=STUDY), "MANY")[-1][0].Status == 0
        assert len(scp.stored) == len(seen) == COUNT
        assert len({assoc for assoc, _ in seen}) == 1
    with Scp("MANY", PORT).takes() as scp:

        def abort_all_but_one(event: evt.Event) -> None:
            look(event)
            if event.assoc is not seen[0][0]:
                event.assoc.abort()

        seen.clear()
        scp.before = abort_all_but_one
        status, failed = moved(full, keys(StudyInstanceUID=STUDY), "MANY")[-1]
        assert failed is not None
        aborted = {uid for assoc, uid in seen if assoc is not seen[0][0]}
        assert set(failed.FailedSOPInstanceUIDList) == aborted
        assert status.NumberOfFailedSuboperations + status.NumberOfCompletedSuboperations == COUNT
        assert status.NumberOfCompletedSuboperations == sum(assoc is seen[0][0] for assoc, _ in seen)
        assert status.NumberOfFailedSuboperations <= 3


def test_one_that_is_refused_does_not_end_the_rest(full: Gateway) -> None:
    with Scp("VIEWER", PORT).takes() as scp:
        scp.before = lambda event: setattr(scp, "status", 0xA700 if len(scp.stored) == 3 else 0)
        status, _ = moved(full, keys(StudyInstanceUID=STUDY))[-1]
    assert (status.Status, status.NumberOfFailedSuboperations) == (0xB000, 1)


def test_conversion_only_where_nothing_else_is_taken(full: Gateway) -> None:
    with Scp("VIEWER", PORT).takes() as scp:
        moved(full, keys(StudyInstanceUID=STUDY))
        assert set(scp.syntaxes.values()) == {str(ExplicitVRLittleEndian)}
    with Scp("VIEWER", PORT).takes(ImplicitVRLittleEndian) as scp:
        assert moved(full, keys(StudyInstanceUID=STUDY))[-1][0].Status == 0
        assert set(scp.syntaxes.values()) == {str(ImplicitVRLittleEndian)}
        assert len(scp.stored) == COUNT


def test_cancel(full: Gateway) -> None:
    with Scp("VIEWER", PORT).takes() as scp:
        association = associate(full, MOVE)
        scp.before = lambda event: time.sleep(0.05)
        counts = []
        for number, (status, _) in enumerate(association.send_c_move(keys(StudyInstanceUID=STUDY), "VIEWER", MOVE)):
            if number == 1:
                association.send_c_cancel(1, query_model=MOVE)
            counts.append(status)
        association.release()
    assert counts[-1].Status == 0xFE00
    assert counts[-1].NumberOfRemainingSuboperations > 0
    assert len(scp.stored) < COUNT


def test_requester_that_goes_away_gets_its_images_delivered(full: Gateway) -> None:
    with Scp("VIEWER", PORT).takes() as scp:
        scp.before = lambda event: time.sleep(0.02)
        association = associate(full, MOVE)
        answers = association.send_c_move(keys(StudyInstanceUID=STUDY), "VIEWER", MOVE)
        next(answers)
        association.abort()
        wait_for(lambda: len(scp.stored) == COUNT, "everything at the destination")


# -- identifiers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        keys("PATIENT", PatientID="x"),
        keys("STUDY"),
        keys("STUDY", StudyInstanceUID="1.2.*"),
        keys("IMAGE", StudyInstanceUID=STUDY),
        keys("NONSENSE", StudyInstanceUID=STUDY),
    ],
    ids=["level of another model", "no unique key", "wild card", "unique key of another level", "no such level"],
)
def test_retrieve_identifiers_that_do_not_fit(full: Gateway, asked: Dataset) -> None:
    assert moved(full, asked)[-1][0].Status == 0xA900


def test_cancel_after_the_end_is_ignored(full: Gateway) -> None:
    association = associate(full, FIND)
    asked = keys(StudyInstanceUID="")
    first = [status.Status for status, _ in association.send_c_find(asked, FIND)]
    association.send_c_cancel(1, query_model=FIND)
    association.send_c_cancel(99, query_model=FIND)
    again = [status.Status for status, _ in association.send_c_find(asked, FIND)]
    association.release()
    assert first == again == [0xFF00, 0x0000]


def test_query_is_cancelled_within_200_matches(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    one = dataset(SeriesInstanceUID=f"{STUDY}.1", StudyInstanceUID=STUDY)
    with gateway.client(Object(str(CTImageStorage), "1.2", str(ExplicitVRLittleEndian), b"")) as client:
        for number in range(600):
            one.SOPInstanceUID = f"{STUDY}.1.{number}"
            raw = Object(str(CTImageStorage), str(one.SOPInstanceUID), str(ExplicitVRLittleEndian), encoded(one))
            assert client.store(raw) == 0
    association = associate(gateway, FIND)
    asked = keys("IMAGE", StudyInstanceUID=STUDY, SeriesInstanceUID=f"{STUDY}.1", SOPInstanceUID="", ImageType="")
    statuses = []
    for status, _ in association.send_c_find(asked, FIND):
        if not statuses:
            association.send_c_cancel(1, query_model=FIND)
        statuses.append(status.Status)
    association.release()
    assert statuses[-1] == 0xFE00
    assert statuses.count(0xFF00) <= 200


def test_more_matches_than_the_limit(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway(TANDEM__DICOM__QUERY_LIMIT="2")
    for limit, expected in ((2, 0x0000), (3, 0xA700)):
        one = dataset()
        raw = Object(str(one.SOPClassUID), str(one.SOPInstanceUID), str(ExplicitVRLittleEndian), encoded(one))
        with gateway.client(raw) as client:
            assert client.store(raw) == 0
        while gateway.status()["instances"] < limit:
            one = dataset()
            raw = Object(str(one.SOPClassUID), str(one.SOPInstanceUID), str(ExplicitVRLittleEndian), encoded(one))
            with gateway.client(raw) as client:
                assert client.store(raw) == 0
        association = associate(gateway, FIND)
        statuses = [status.Status for status, _ in association.send_c_find(keys(StudyInstanceUID=""), FIND)]
        association.release()
        assert statuses == [0xFF00, 0xFF00, expected]


# -- commitment --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["TransactionUID", "ReferencedSOPSequence"])
def test_commitment_request_without_what_it_needs(full: Gateway, missing: str) -> None:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, generate_uid()
    action = Dataset()
    action.TransactionUID, action.ReferencedSOPSequence = generate_uid(), [item]
    del action[missing]
    association = associate(full, StorageCommitmentPushModel)
    status, _ = association.send_n_action(action, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance)
    assert status.Status == 0x0115
    status, _ = association.send_n_action(action, 2, StorageCommitmentPushModel, StorageCommitmentPushModelInstance)
    assert status.Status == 0x0123
    status, _ = association.send_n_action(action, 1, StorageCommitmentPushModel, generate_uid())
    assert status.Status == 0x0112
    association.release()


# -- negotiation -------------------------------------------------------------------------------------------------------


def identity(name: str, password: str | None) -> UserIdentityNegotiation:
    item = UserIdentityNegotiation()
    item.user_identity_type = 2 if password is not None else 1
    item.primary_field = name.encode()
    item.secondary_field = (password or "").encode()
    item.positive_response_requested = True
    return item


def test_users(new_gateway: Callable[..., Gateway]) -> None:
    kept = hash_password(b"secret", b"salt")
    gateway = new_gateway(TANDEM__DICOM__USERS=f'{{ ct1 = "{kept}" }}')
    assert associate(gateway, Verification, ext_neg=[identity("ct1", "secret")]).is_established
    for wrong in ([identity("ct1", "Secret")], [identity("ct2", "secret")], [identity("ct1", None)], []):
        assert is_rejected(gateway, wrong)


def is_rejected(gateway: Gateway, shown: list[UserIdentityNegotiation]) -> bool:
    """pynetdicom aborts one in a hundred by itself, when the rejection and the end of the connection come together."""
    for _ in range(5):
        association = associate(gateway, Verification, ext_neg=shown)
        assert not association.is_established
        if association.is_rejected:
            return True
    return False


def test_extended_negotiation(full: Gateway) -> None:
    queries = SOPClassExtendedNegotiation()
    queries.sop_class_uid, queries.service_class_application_information = FIND, b"\x01\x01\x01\x01\x00"
    storage = SOPClassExtendedNegotiation()
    storage.sop_class_uid, storage.service_class_application_information = CTImageStorage, b"\x02\x00\x03\x00\x01\x00"
    window = AsynchronousOperationsWindowNegotiation()
    window.maximum_number_operations_invoked, window.maximum_number_operations_performed = 0, 5
    association = associate(full, FIND, CTImageStorage, ext_neg=[queries, storage, window])
    items = association.acceptor.user_information
    said = {
        item.sop_class_uid: item.service_class_application_information
        for item in items
        if isinstance(item, SOPClassExtendedNegotiation)
    }
    assert said == {FIND: b"\x01\x01\x01", CTImageStorage: b"\x02\x00\x03\x00\x00\x00"}
    agreed = next(item for item in items if isinstance(item, AsynchronousOperationsWindowNegotiation))
    assert 1 <= agreed.maximum_number_operations_invoked <= 16
    assert agreed.maximum_number_operations_performed == 1
    relational = keys("IMAGE", SOPInstanceUID="", NumberOfSeriesRelatedInstances="")
    answers = [answer for _, answer in association.send_c_find(relational, FIND) if answer]
    association.release()
    assert len(answers) == COUNT


def test_private_class_by_its_general_one(full: Gateway) -> None:
    common = SOPClassCommonExtendedNegotiation()
    common.sop_class_uid, common.service_class_uid = PRIVATE_CLASS, "1.2.840.10008.4.2"
    common.related_general_sop_class_identification = [CTImageStorage]
    assert associate(full, PRIVATE_CLASS).is_rejected or not associate(full, PRIVATE_CLASS).accepted_contexts
    association = associate(full, PRIVATE_CLASS, Verification, ext_neg=[common])
    assert PRIVATE_CLASS in [context.abstract_syntax for context in association.accepted_contexts]
    image = dataset(SOPClassUID=PRIVATE_CLASS)
    image.file_meta = Dataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.ensure_file_meta()
    assert association.send_c_store(image).Status == 0
    association.release()


def test_each_context_of_a_class_has_its_own_transfer_syntax(full: Gateway) -> None:
    ae = AE("SOMEBODY")
    offers = [[JPEG2000Lossless], [ExplicitVRLittleEndian, ImplicitVRLittleEndian], [ImplicitVRLittleEndian]]
    for offer in offers:
        ae.add_requested_context(CTImageStorage, offer)
    association = ae.associate("127.0.0.1", full.port, ae_title="TANDEM")
    accepted = [context.transfer_syntax[0] for context in association.accepted_contexts]
    association.release()
    assert accepted == [offer[0] for offer in offers]


@pytest.mark.parametrize("version", [None, "", "X" * 16])
def test_implementation_may_say_little_of_itself(full: Gateway, version: str | None) -> None:
    """Without Implementation Class UID and version name, or with odd ones."""
    request = A_ASSOCIATE()
    request.application_context_name = "1.2.840.10008.3.1.1.1"
    request.calling_ae_title, request.called_ae_title = "OLD", "TANDEM"
    context = build_context(Verification, ImplicitVRLittleEndian)
    context.context_id = 1
    request.presentation_context_definition_list = [context]
    length = MaximumLengthNotification()
    length.maximum_length_received = 16384
    pdu = A_ASSOCIATE_RQ()
    request.user_information = [length]
    pdu.from_primitive(request)
    raw = pdu.encode()
    if version is not None:
        item = b"\x55\0" + len(version).to_bytes(2, "big") + version.encode()
        at = raw.index(b"\x50\0")
        inside = int.from_bytes(raw[at + 2 : at + 4], "big") + len(item)
        raw = raw[: at + 2] + inside.to_bytes(2, "big") + raw[at + 4 :] + item
        raw = raw[:2] + (len(raw) - 6).to_bytes(4, "big") + raw[6:]
    with full.raw() as connection:
        connection.sendall(raw)
        assert connection.recv(1) == b"\2"


def test_move_over_tls(new_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    """The destination's certificate is checked against the authority that the settings name."""
    key, certificate, port = tmp_path / "key.pem", tmp_path / "cert.pem", free_port()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    known = (
        f'{{ VIEWER = {{ host = "localhost", port = {port}, timeout_s = 5.0, tls = true, ca_file = "{certificate}" }}, '
    )
    known += f'DOUBTFUL = {{ host = "localhost", port = {port}, timeout_s = 5.0, tls = true }} }}'
    gateway = new_gateway(TANDEM__DICOM__DESTINATIONS=known)
    one = dataset()
    raw = Object(str(one.SOPClassUID), str(one.SOPInstanceUID), str(ExplicitVRLittleEndian), encoded(one))
    with gateway.client(raw) as client:
        assert client.store(raw) == 0
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    with Scp("VIEWER", port).takes().with_tls(context) as scp:
        assert moved(gateway, keys(StudyInstanceUID=one.StudyInstanceUID))[-1][0].Status == 0
        assert scp.stored == {raw.sop_instance: raw.data}
        assert moved(gateway, keys(StudyInstanceUID=one.StudyInstanceUID), "DOUBTFUL")[-1][0].Status == 0xA702


def test_commitment_request_that_is_malformed_or_too_long(full: Gateway) -> None:
    association = associate(full, StorageCommitmentPushModel)
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, "1.2.3"
    action = Dataset()
    action.TransactionUID = generate_uid()
    action.add_new(0x00081199, "LO", "no sequence")
    status, _ = association.send_n_action(action, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance)
    assert status.Status == 0x0115
    del action[0x00081199]
    action.ReferencedSOPSequence = [item] * 20001
    status, _ = association.send_n_action(action, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance)
    assert status.Status == 0x0115
    association.release()


def test_destination_that_stops_reading(new_gateway: Callable[..., Gateway]) -> None:
    """It accepts the association and takes nothing of the data set: that sub-operation fails, the gateway goes on."""
    known = f'{{ VIEWER = {{ host = "127.0.0.1", port = {PORT}, timeout_s = 2.0 }} }}'
    gateway = new_gateway(TANDEM__DICOM__DESTINATIONS=known)
    one = dataset(PixelData=bytes(40_000_000))
    raw = Object(str(one.SOPClassUID), str(one.SOPInstanceUID), str(ExplicitVRLittleEndian), encoded(one))
    with gateway.client(raw) as client:
        assert client.store(raw) == 0

    def accept_and_sleep(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        head = connection.recv(6, socket.MSG_WAITALL)
        request = decode_request(head + connection.recv(int.from_bytes(head[2:], "big"), socket.MSG_WAITALL))
        answer = negotiate(request, DicomSettings())
        assert isinstance(answer, Negotiated)
        connection.sendall(answer.response)
        asleep.wait(60)
        connection.close()

    asleep = threading.Event()
    with socket.create_server(("127.0.0.1", PORT)) as listener:
        server = threading.Thread(target=accept_and_sleep, args=(listener,), daemon=True)
        server.start()
        status, _ = moved(gateway, keys(StudyInstanceUID=one.StudyInstanceUID))[-1]
        asleep.set()
        server.join(30)
    assert (status.Status, status.NumberOfFailedSuboperations) == (0xA702, 1)


def test_sequences_and_private_attributes_are_matched_and_returned(new_gateway: Callable[..., Gateway]) -> None:
    """They aren't in the catalogue: the file says what they are, at every level."""
    gateway = new_gateway()
    wanted = {}
    for step in ("STEP1", "STEP2"):
        item = Dataset()
        item.ScheduledProcedureStepID, item.RequestedProcedureID = step, f"R{step}"
        one = dataset(RequestAttributesSequence=[item])
        one.private_block(0x0011, "TANDEM TEST", create=True).add_new(1, "LO", f"private {step}")
        raw = Object(str(one.SOPClassUID), str(one.SOPInstanceUID), str(ExplicitVRLittleEndian), encoded(one))
        with gateway.client(raw) as client:
            assert client.store(raw) == 0
        wanted[step] = one
    key = Dataset()
    key.ScheduledProcedureStepID, key.RequestedProcedureID = "STEP2", ""
    for level in ("STUDY", "SERIES", "IMAGE"):
        asked = keys(level, RequestAttributesSequence=[key], StudyInstanceUID="")
        if level != "STUDY":
            asked.StudyInstanceUID = wanted["STEP2"].StudyInstanceUID
        if level == "IMAGE":
            asked.SeriesInstanceUID = wanted["STEP2"].SeriesInstanceUID
        association = associate(gateway, FIND)
        answers = [answer for _, answer in association.send_c_find(asked, FIND) if answer]
        association.release()
        assert [answer.StudyInstanceUID for answer in answers] == [wanted["STEP2"].StudyInstanceUID], level
        (item,) = answers[0].RequestAttributesSequence
        assert (item.ScheduledProcedureStepID, item.RequestedProcedureID) == ("STEP2", "RSTEP2")
    private = keys("STUDY", StudyInstanceUID="")
    private.private_block(0x0011, "TANDEM TEST", create=True).add_new(1, "LO", "*STEP1")
    association = associate(gateway, FIND)
    answers = [answer for _, answer in association.send_c_find(private, FIND) if answer]
    association.release()
    assert [answer.StudyInstanceUID for answer in answers] == [wanted["STEP1"].StudyInstanceUID]


def test_sop_class_of_the_command_must_be_that_of_the_context(full: Gateway) -> None:
    association = associate(full, FIND, MOVE)
    context = next(one for one in association.accepted_contexts if one.abstract_syntax == FIND)
    context.abstract_syntax = MOVE  # the library sends a C-MOVE where C-FIND was agreed on
    other = next(one for one in association._accepted_cx.values() if one is not context)
    other.abstract_syntax = FIND
    answers = list(association.send_c_move(keys(StudyInstanceUID=STUDY), "VIEWER", MOVE))
    assert answers[-1][0].Status in (0x0211, 0x0122)
    association.release()
