import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dicom.dimse import (
    Assembler,
    Command,
    CommandReceived,
    DataReceived,
    Request,
    decode_command,
    encode_response,
)
from gateway.dicom.upper_layer import Fragment, ProtocolError
from tools.cli.dicom_client import store_command


def fragment(data: bytes, *, command: bool, last: bool, context: int = 1) -> Fragment:
    return Fragment(context, command, last, memoryview(data))


def test_store_request_is_read() -> None:
    request = decode_command(store_command(7, "1.2.840.10008.5.1.4.1.1.2", "1.2.3"))
    assert request == Request(Command.C_STORE_RQ, 7, "1.2.840.10008.5.1.4.1.1.2", "1.2.3", True, 0, 0)


def test_response_repeats_what_was_asked() -> None:
    request = decode_command(store_command(7, "1.2.3.4", "1.2.3"))
    raw = encode_response(request, 0xA700, comment="full")
    answer = decode_command(raw)
    assert answer.field == 0x8001
    assert answer.responded_to == 7
    assert answer.sop_instance == "1.2.3"
    assert not answer.has_data
    assert struct.pack("<HHL", 0, 0x0902, 4) + b"full" in raw
    assert int.from_bytes(raw[8:12], "little") == len(raw) - 12


def test_message_in_pieces() -> None:
    raw = store_command(1, "1.2", "1.3")
    assembler = Assembler()
    assert assembler.receive(fragment(raw[:9], command=True, last=False)) is None
    received = assembler.receive(fragment(raw[9:], command=True, last=True))
    assert isinstance(received, CommandReceived)
    assert assembler.mid_message
    part = assembler.receive(fragment(b"abc", command=False, last=False))
    assert isinstance(part, DataReceived)
    assert not part.last
    assert isinstance(assembler.receive(fragment(b"", command=False, last=True)), DataReceived)
    assert not assembler.mid_message


@pytest.mark.parametrize(
    "bad",
    [
        fragment(b"x", command=False, last=True, context=3),
        fragment(store_command(2, "1.2", "1.4"), command=True, last=True),
    ],
    ids=["data in another context", "another command"],
)
def test_data_set_interrupted(bad: Fragment) -> None:
    assembler = Assembler()
    assembler.receive(fragment(store_command(1, "1.2", "1.3"), command=True, last=True))
    with pytest.raises(ProtocolError):
        assembler.receive(bad)


def test_data_without_command() -> None:
    with pytest.raises(ProtocolError):
        Assembler().receive(fragment(b"x", command=False, last=True))


@given(st.binary(max_size=200))
def test_rubbish_is_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode_command(data)
