"""Bad input against a real gateway process: each gets the answer of the Standard, and the gateway goes on."""

import json
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from tests.builders import dataset, encoded, item, pdu, pdv
from tests.conftest import Gateway, wait_for
from tools.cli.dicom_client import AssociationFailed, DicomClient, Object, store_command

ABORT = 7


def read_pdu(connection: socket.socket) -> int | None:
    """Type of the next PDU, None if the connection was closed instead."""
    try:
        head = connection.recv(6, socket.MSG_WAITALL)
        if len(head) < 6:
            return None
        connection.recv(struct.unpack(">BxL", head)[1], socket.MSG_WAITALL)
    except ConnectionResetError:
        return None
    return head[0]


def works(gateway: Gateway) -> bool:
    fresh = item()
    with gateway.client(fresh) as client:
        return client.store(fresh) == 0


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\xff" * 4096, b"\x16\x03\x01\x02\x00\x01"])
def test_garbage_on_the_port(gateway: Gateway, garbage: bytes) -> None:
    with gateway.raw() as connection:
        connection.sendall(garbage)
        assert read_pdu(connection) in (ABORT, None)
    assert works(gateway)


@pytest.mark.parametrize("kind", range(1, 8))
def test_pdu_of_4_gib_before_association(gateway: Gateway, kind: int) -> None:
    with gateway.raw() as connection:
        connection.sendall(struct.pack(">BxL", kind, 0xFFFFFFFF))
        assert read_pdu(connection) in (ABORT, None)
    assert works(gateway)


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5, 6, 0, 8, 0x7F, 0xFF])
def test_wrong_pdu_in_an_association(gateway: Gateway, kind: int) -> None:
    fresh = item()
    with gateway.client(fresh) as client:
        client.send_raw(struct.pack(">BxL", kind, 0xFFFFFFFF if kind in (4, 5) else 4) + bytes(4))
        assert client.read_pdu()[0] == ABORT
    assert works(gateway)


def test_malformed_association_request(gateway: Gateway) -> None:
    with gateway.raw() as connection:
        connection.sendall(pdu(1, struct.pack(">H", 1) + bytes(66) + b"\x10\x00\xff\xff" + b"1.2"))
        assert read_pdu(connection) == ABORT
    assert works(gateway)


def test_data_set_cut_short_by_the_sender(gateway: Gateway) -> None:
    fresh = item()
    before = gateway.status()["instances"]
    with gateway.client(fresh) as client:
        client.send_raw(client.pdvs(1, store_command(1, fresh.sop_class, fresh.sop_instance), command=True))
        client.send_raw(pdu(4, pdv(1, 0, fresh.data[:100])))
    wait_for(lambda: not list((gateway.volume / "spool").iterdir()), "the spool to be empty")
    assert gateway.status()["instances"] == before
    assert works(gateway)


def test_data_set_that_ends_in_the_middle_of_an_element(gateway: Gateway) -> None:
    whole = item()
    broken = Object(whole.sop_class, whole.sop_instance, whole.transfer_syntax, whole.data[:60])
    before = len(gateway.quarantined())
    with gateway.client(broken) as client:
        assert client.store(broken) in (0xA900, 0xC000)
        assert client.store(whole) == 0
    assert len(gateway.quarantined()) == before + 1


def test_command_that_does_not_fit_its_context(gateway: Gateway) -> None:
    fresh = item()
    with gateway.client(fresh) as client:
        client.send_raw(client.pdvs(1, store_command(1, str(MRImageStorage), fresh.sop_instance), command=True))
        client.send_raw(client.pdvs(1, fresh.data, command=False))
        assert client.status() == 0x0122
        assert client.store(fresh) == 0


def test_context_that_was_not_accepted(gateway: Gateway) -> None:
    fresh = item()
    with gateway.client(fresh) as client:
        client.send_raw(client.pdvs(99, store_command(1, fresh.sop_class, fresh.sop_instance), command=True))
        assert client.read_pdu()[0] == ABORT


LONG_LENGTH = struct.pack("<HHL", 0, 0x100, 0xFFFFFFFF)
GROUP_8 = struct.pack("<HHL", 8, 0x100, 2) + b"\1\0"


@pytest.mark.parametrize(
    "command",
    [b"", b"\0" * 7, LONG_LENGTH, GROUP_8, bytes(70000)],
    ids=["empty", "short", "long-length", "group-8", "huge"],
)
def test_malformed_command_set(gateway: Gateway, command: bytes) -> None:
    fresh = item()
    with gateway.client(fresh) as client:
        client.send_raw(client.pdvs(1, command, command=True) if command else pdu(4, pdv(1, 3, b"")))
        assert client.read_pdu()[0] == ABORT
    assert works(gateway)


def test_command_and_data_set_disagree(gateway: Gateway) -> None:
    fresh = item()
    other = Object(fresh.sop_class, str(generate_uid()), fresh.transfer_syntax, fresh.data)
    with gateway.client(other) as client:
        assert client.store(other) == 0xA900


@pytest.mark.parametrize("uid", ["../../etc/passwd", "1.2\0.3", "1.2\n.3", "1." * 40, "", "abc", "1..2"])
def test_bad_uids_are_refused_and_kept_aside(gateway: Gateway, uid: str) -> None:
    made = dataset()
    raw = encoded(made).replace(str(made.SOPInstanceUID).encode(), b"")
    text = uid.encode() + (b"\0" if len(uid) % 2 else b"")
    element = struct.pack("<HH2sH", 8, 0x18, b"UI", len(text)) + text
    head = raw.find(struct.pack("<HH2s", 8, 0x18, b"UI"))
    old_length = struct.unpack_from("<H", encoded(made), head + 6)[0]
    data = raw[:head] + element + raw[head + 8 + (old_length - len(str(made.SOPInstanceUID))) :]
    bad = Object(str(CTImageStorage), uid, str(ExplicitVRLittleEndian), data)
    before = len(gateway.quarantined())
    with gateway.client(bad) as client:
        assert client.store(bad) in (0xA900, 0xC000)
    assert len(gateway.quarantined()) == before + 1
    assert works(gateway)


ODD_IDS = ["../../../etc", "a\\b", "x" * 64 + "y" * 936, "..", "CON", " ", "a\nb", "a/b:c*?", "ü王"]


@pytest.mark.parametrize("patient", ODD_IDS)
def test_odd_patient_ids_stay_inside_the_tree(gateway: Gateway, patient: str) -> None:
    made = dataset(SpecificCharacterSet="ISO_IR 192")
    made.add_new(0x00100020, "UT", patient)  # a VR that takes anything
    fresh = Object(str(CTImageStorage), str(made.SOPInstanceUID), str(ExplicitVRLittleEndian), encoded(made))
    with gateway.client(fresh) as client:
        assert client.store(fresh) == 0
    name = f"{fresh.sop_instance}.dcm"
    found = wait_for(lambda: list((gateway.volume / "archive").rglob(name)), "the file to be published")
    assert len(found) == 1
    assert len(found[0].relative_to(gateway.volume / "archive").parts) == 4
    assert all(len(part.encode()) <= 100 for part in found[0].parts[-4:])


def test_same_uid_again(gateway: Gateway) -> None:
    fresh = item()
    other = Object(fresh.sop_class, fresh.sop_instance, fresh.transfer_syntax, fresh.data[:-1] + b"x")
    before = len(gateway.quarantined())
    with gateway.client(fresh) as client:
        assert client.store(fresh) == 0
        count = gateway.status()["commit"]
        assert client.store(fresh) == 0
        assert gateway.status()["commit"] == count
        assert len(gateway.quarantined()) == before
        # Other bytes from the same sender into the same series replace what is stored; the old version is kept aside.
        assert client.store(other) == 0
        assert client.store(other) == 0
    wait_for(lambda: len(gateway.quarantined()) == before + 1, "the old version in quarantine")
    note = next(note for note in gateway.quarantined() if fresh.sop_instance in note.read_text())
    assert note.with_suffix(".dcm").read_bytes().endswith(fresh.data)
    held = [path for path in (gateway.volume / "archive").rglob("*.dcm") if path.name.startswith(fresh.sop_instance)]
    assert [path.read_bytes()[-1:] for path in held] == [b"x"]


def test_same_uid_refused_by_policy(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway(TANDEM__STORAGE__DUPLICATES="refuse")
    fresh = item()
    other = Object(fresh.sop_class, fresh.sop_instance, fresh.transfer_syntax, fresh.data[:-1] + b"x")
    with gateway.client(fresh) as client:
        assert client.store(fresh) == 0
        assert client.store(other) == 0x0111
    [note] = gateway.quarantined()
    assert fresh.sop_instance in note.read_text()
    assert note.with_suffix(".dcm").read_bytes().endswith(b"x")


def test_no_room(new_gateway: Callable[..., Gateway]) -> None:
    full = new_gateway(TANDEM__STORAGE__RESERVE_BYTES=str(1 << 60))
    fresh = item()
    with full.client(fresh) as client:
        assert client.store(fresh) == 0xA700
        assert client.store(fresh) == 0xA700
    assert full.status()["instances"] == 0
    assert not list((full.volume / "spool").iterdir())
    assert not list((full.volume / "archive").rglob("*.dcm"))
    assert full.status()["nodes"]["standalone"]["volumes"][0]["state"] == "full"


def test_missing_volume_marker(new_gateway: Callable[..., Gateway]) -> None:
    one = new_gateway()
    stored, fresh = item(), item()
    with one.client(stored) as client:
        assert client.store(stored) == 0
    one.stop()
    marker = one.volume / "tandem-volume.json"
    marker.rename(one.folder / "aside.json")
    other = one.folder / "other"
    one.environment["TANDEM__STORAGE__VOLUMES"] = json.dumps([str(one.volume), str(other)])
    (one.volume / "tandem-volume.json").write_text("{}")
    one.start()
    states = [volume["state"] for volume in one.status()["nodes"]["standalone"]["volumes"]]
    assert all(state.startswith("offline") for state in states)
    with one.client(fresh) as client:
        assert client.store(fresh) == 0xA700
    assert not other.exists()


def test_a_drip_is_cut(new_gateway: Callable[..., Gateway]) -> None:
    slow = new_gateway(TANDEM__DICOM__ARTIM_TIMEOUT_S="2.0", TANDEM__DICOM__MESSAGE_TIMEOUT_S="2.0")
    fresh = item()
    with slow.raw() as connection, slow.client(fresh) as client:
        command = client.pdvs(1, store_command(1, fresh.sop_class, fresh.sop_instance), command=True)
        request = pdu(1, bytes(200))
        for number in range(60):
            try:
                connection.sendall(request[number : number + 1])
                client.send_raw(command[number : number + 1])
            except OSError:
                break
            time.sleep(0.5)
        assert read_pdu(connection) in (ABORT, None)
        with pytest.raises((AssociationFailed, OSError)):
            client.status()
    assert works(slow)


def test_association_limit_counts_only_associations(new_gateway: Callable[..., Gateway]) -> None:
    small = new_gateway(TANDEM__DICOM__MAX_ASSOCIATIONS="2")
    fresh = item()
    idle = [small.raw() for _ in range(5)]
    with small.client(fresh) as first, small.client(fresh) as second:
        with pytest.raises(AssociationFailed, match="PDU 3"):
            small.client(fresh)
        assert first.store(fresh) == 0
        second.release()
        with wait_for(lambda: _try(small, fresh), "an association to be free"):
            pass
    for connection in idle:
        connection.close()


def _try(gateway: Gateway, fresh: Object) -> DicomClient | None:
    try:
        return gateway.client(fresh)
    except AssociationFailed:
        return None


def test_ae_title_rules(new_gateway: Callable[..., Gateway]) -> None:
    strict = new_gateway(TANDEM__DICOM__REQUIRE_CALLED_AET="true", TANDEM__DICOM__CALLING_AETS='["BENCH"]')
    fresh = item()
    context = [(fresh.sop_class, fresh.transfer_syntax)]
    with pytest.raises(AssociationFailed, match="PDU 3, 00010107"):
        DicomClient("127.0.0.1", strict.port, "SOMEBODY", context, 30)
    with strict.client(fresh) as client:
        assert client.store(fresh) == 0


def test_unknown_sop_class_by_setting(gateway: Gateway, new_gateway: Callable[..., Gateway]) -> None:
    private = item(SOPClassUID="1.2.3.4.5.6.7")
    with gateway.client(private) as client:
        assert not client.contexts
    lenient = new_gateway(TANDEM__DICOM__ANY_SOP_CLASS="true")
    with lenient.client(private) as client:
        assert client.store(private) == 0


def test_no_patient_data_in_the_log(gateway: Gateway, tmp_path: Path) -> None:
    assert "Test^Patient" not in gateway.log()
