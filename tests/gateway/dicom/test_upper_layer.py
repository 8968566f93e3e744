"""The upper layer without sockets: PDUs as bytes, split anywhere, and rubbish."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dicom.states import TRANSITIONS, PduType, State
from gateway.dicom.upper_layer import AssociationRequested, Event, Fragment, ProtocolError, ReleaseRequested, UpperLayer
from tests.builders import pdu, pdv

# A-ASSOCIATE-RQ of an echo: PS3.8 9.3.2, one presentation context, Verification in implicit VR little endian.
ECHO_RQ = bytes.fromhex(
    "0100000000ba00010000414e592d5343502020202020202020204543484f534355202020202020202020000000000000"
    "000000000000000000000000000000000000000000000000000010000015312e322e3834302e31303030382e332e312e"
    "312e312000002e0100000030000011312e322e3834302e31303030382e312e3140000011312e322e3834302e31303030"
    "382e312e325000002751000004000040005200001b312e322e3237362e302e373233303031302e332e302e332e362e37"
)
RELEASE_RQ = bytes.fromhex("05000000000400000000")


def feed(upper: UpperLayer, data: bytes, step: int = 0) -> list[Event]:
    found: list[Event] = []
    for start in range(0, len(data), step or len(data)):
        for event in upper.receive(memoryview(data[start : start + (step or len(data))])):
            if isinstance(event, Fragment):
                event = Fragment(event.context_id, event.is_command, event.last, memoryview(bytes(event.data)))
            found.append(event)
    return found


def established() -> UpperLayer:
    upper = UpperLayer(16384)
    assert isinstance(feed(upper, ECHO_RQ)[0], AssociationRequested)
    upper.accept(b"", 16384)
    return upper


@pytest.mark.parametrize("step", [0, 1, 5, 7, 100])
def test_association_request_however_split(step: int) -> None:
    upper = UpperLayer(16384)
    [event] = feed(upper, ECHO_RQ, step)
    assert isinstance(event, AssociationRequested)
    assert upper.state is State.STA3
    assert event.request.calling_aet == "ECHOSCU"


@pytest.mark.parametrize("step", [0, 1, 3, 11])
def test_fragments_however_split(step: int) -> None:
    data = pdu(4, pdv(1, 3, b"command") + pdv(1, 0, b"abc")) + pdu(4, pdv(1, 2, b"def")) + RELEASE_RQ
    events = feed(established(), data, step)
    assert isinstance(events.pop(), ReleaseRequested)
    fragments = [event for event in events if isinstance(event, Fragment)]
    assert b"".join(bytes(f.data) for f in fragments if f.is_command) == b"command"
    assert b"".join(bytes(f.data) for f in fragments if not f.is_command) == b"abcdef"
    assert [f.last for f in fragments if not f.is_command][-1]
    assert sum(f.last for f in fragments) == 2


def test_a_pdv_without_data_ends_a_data_set() -> None:
    [fragment] = feed(established(), pdu(4, pdv(1, 2, b"")))
    assert isinstance(fragment, Fragment)
    assert fragment.last


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (struct.pack(">LBB", 1, 1, 0), "PDV shorter than its header"),
        (struct.pack(">LBB", 100, 1, 0) + b"x", "PDV longer than its PDU"),
        (pdv(2, 0, b"x"), "even context ID"),
        (pdv(1, 0, b"x") + b"123", "stray bytes"),
    ],
)
def test_malformed_data(body: bytes, what: str) -> None:
    with pytest.raises(ProtocolError):
        feed(established(), pdu(4, body))


def test_data_longer_than_the_maximum() -> None:
    with pytest.raises(ProtocolError, match="P-DATA-TF of 20000"):
        feed(established(), struct.pack(">BxL", 4, 20000))


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("code", range(10))
def test_every_pdu_in_every_state(state: State, code: int) -> None:
    upper = UpperLayer(16384)
    upper.state = state
    data = bytes((code,)) + ECHO_RQ[1:] if code in (1, 2) else pdu(code, pdv(1, 2, b"x") if code == 4 else bytes(4))
    known = code in set(PduType)
    refused = state is not State.STA13 and (not known or TRANSITIONS[state][PduType(code)].name == "ABORT")
    if refused:
        with pytest.raises(ProtocolError):
            feed(upper, data)
    else:
        feed(upper, data)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.booleans())
def test_rubbish_gives_events_or_a_protocol_error(parts: list[bytes], in_association: bool) -> None:
    upper = established() if in_association else UpperLayer(16384)
    try:
        for part in parts:
            feed(upper, part)
    except ProtocolError:
        assert upper.abort(2, 0)[0] == 7


@given(st.binary(max_size=300))
def test_rubbish_in_an_association_request(body: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        feed(UpperLayer(16384), pdu(1, body))


@given(st.binary(max_size=500), st.integers(8, 100))
def test_what_is_sent_comes_back(payload: bytes, peer_max: int) -> None:
    upper = established()
    upper.peer_max_pdu_bytes = peer_max
    sent = upper.data(5, False, payload)
    fragments = [event for event in feed(established(), sent) if isinstance(event, Fragment)]
    assert b"".join(bytes(f.data) for f in fragments) == payload
    assert fragments[-1].last
    assert all(f.context_id == 5 and not f.is_command for f in fragments)
