"""A-ASSOCIATE: lenient in what is taken, strict in what is sent; whatever comes in is an answer or `Malformed`."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ

from conf.settings import DicomSettings
from gateway.dicom.associate import (
    TRANSFER_SYNTAXES_MAX,
    AssociateAccept,
    AssociateRequest,
    CommonExtended,
    Malformed,
    Proposed,
    UserIdentity,
    UserInformation,
    decode_accept,
    decode_request,
    encode_request,
)
from gateway.dimse.negotiate import Negotiated, Rejection, negotiate
from tests.conftest import FUZZ

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


def item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value


def context(number: int, abstract: bytes, *transfer: bytes) -> bytes:
    inner = item(0x30, abstract) if abstract else b""
    return item(0x20, struct.pack(">Bxxx", number) + inner + b"".join(item(0x40, uid) for uid in transfer))


def request(
    *items: bytes, called: bytes = b"TANDEM", calling: bytes = b"CT1", version: int = 1, user: bytes = b""
) -> bytes:
    body = struct.pack(">Hxx16s16s32x", version, called.ljust(16), calling.ljust(16))
    body += item(0x10, b"1.2.840.10008.3.1.1.1") + b"".join(items)
    body += item(0x50, item(0x51, (16384).to_bytes(4, "big")) + item(0x52, b"1.2.3") + user)
    return struct.pack(">BxL", 1, len(body)) + body


CT_CONTEXT = context(1, CT.encode(), EXPLICIT.encode())


def accepted(pdu: bytes, **settings_: object) -> Negotiated:
    answer = negotiate(decode_request(pdu), DicomSettings(**settings_))  # type: ignore[arg-type]
    assert isinstance(answer, Negotiated), answer
    decoded = A_ASSOCIATE_AC()  # strict where ours is lenient
    decoded.decode(answer.response)
    decoded.to_primitive()
    return answer


@pytest.mark.parametrize(
    ("raw", "title"),
    [
        (b"TANDEM" + bytes(10), "TANDEM"),
        (b"TANDEM    ", "TANDEM"),
        (b" CT 1 ", "CT 1"),
        (b"\xc4E\\1", "?E\\1"),
        (b" ", ""),
    ],
)
def test_ae_titles(raw: bytes, title: str) -> None:
    answer = decode_request(request(CT_CONTEXT, called=raw, calling=raw))
    assert (answer.called_aet, answer.calling_aet) == (title, title)
    accepted(request(CT_CONTEXT, called=raw))


def test_titles_with_nul_are_ours() -> None:
    accepted(request(CT_CONTEXT, called=b"TANDEM" + bytes(10)), require_called_aet=True)


@pytest.mark.parametrize(
    "pdu",
    [
        request(CT_CONTEXT, user=bytes.fromhex("5a00000461626364")),
        request(CT_CONTEXT) + item(0x60, b"abcd"),
        request(item(0x99, b"x"), CT_CONTEXT),
        request(item(0x20, struct.pack(">Bxxx", 1) + item(0x41, b"x") + CT_CONTEXT[8:])),
        request(CT_CONTEXT, user=item(0x55, b"OSIRIX" + bytes(10))),
        request(CT_CONTEXT, user=item(0x55, b"A VERSION NAME THAT IS TOO LONG BY FAR")),
        request(CT_CONTEXT, user=item(0x52, b"1." * 60)),
        request(CT_CONTEXT, user=item(0x51, b"xx") + item(0x53, b"x") + item(0x54, b"\0\7x")),
        request(CT_CONTEXT, user=item(0x54, struct.pack(">H", len(CT)) + CT.encode() + b"\2\2")),
        request(CT_CONTEXT, user=item(0x58, bytes((9, 1)) + b"\0\1x\0\0")),
        request(context(0, CT.encode(), EXPLICIT.encode()), context(4, CT.encode(), EXPLICIT.encode()), CT_CONTEXT),
        request(CT_CONTEXT, CT_CONTEXT),
        request(context(3, CT.encode()), context(5, CT.encode(), b""), CT_CONTEXT),
        request(context(3, b"", EXPLICIT.encode()), CT_CONTEXT),
        request(context(3, CT.encode(), b"1." * 40), CT_CONTEXT),
    ],
)
def test_odd_requests_come_in(pdu: bytes) -> None:
    fixed = struct.pack(">BxL", 1, len(pdu) - 6) + pdu[6:]
    answer = accepted(fixed)
    assert answer.contexts[1].transfer_syntax == EXPLICIT
    assert set(answer.contexts) == {1}


def test_contexts_that_cannot_be_are_answered() -> None:
    answer = accepted(
        request(CT_CONTEXT, context(3, b"1.2.3", EXPLICIT.encode()), context(5, CT.encode()), context(7, b"", b"1.2"))
    )
    results = {one.context_id: one.result for one in decode_accept(answer.response).results}
    assert results == {1: 0, 3: 3, 5: 4, 7: 3}


def test_protocol_version_without_bit_0_is_rejected() -> None:
    answer = negotiate(decode_request(request(CT_CONTEXT, version=2)), DicomSettings())
    assert isinstance(answer, Rejection)
    assert (answer.result, answer.source, answer.reason) == (1, 2, 2)


def test_very_many_transfer_syntaxes_are_not_looked_at() -> None:
    pdu = request(context(1, CT.encode(), *[b"1.2.%d" % number for number in range(5000)]))
    assert len(decode_request(pdu).contexts[0].transfer_syntaxes) == TRANSFER_SYNTAXES_MAX


@given(st.binary(max_size=600))
@settings(max_examples=400 * FUZZ)
def test_rubbish(body: bytes) -> None:
    pdu = struct.pack(">BxL", 1, len(body)) + body
    for decode in (decode_request, decode_accept):
        try:
            answer = decode(pdu)
        except Malformed:
            continue
        if isinstance(answer, AssociateRequest):
            negotiate(answer, DicomSettings())


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0x10, 0x20, 0x21, 0x50, 0x51, 0x53, 0x54, 0x56, 0x57, 0x58, 0x60]), st.binary(max_size=80)
        )
    )
)
@settings(max_examples=400 * FUZZ)
def test_rubbish_in_items(items: list[tuple[int, bytes]]) -> None:
    inner = b"".join(item(kind, value) for kind, value in items)
    try:
        answer = decode_request(request(inner, user=inner))
    except Malformed:
        return
    assert isinstance(negotiate(answer, DicomSettings()), Negotiated | Rejection)


UIDS = st.sampled_from([CT, EXPLICIT, "1.2.840.10008.1.2", "1.2.3.4.5"])


@given(
    st.lists(st.tuples(UIDS, st.lists(UIDS, min_size=1, max_size=4, unique=True)), min_size=1, max_size=20),
    st.dictionaries(UIDS, st.tuples(st.booleans(), st.booleans()), max_size=3),
    st.one_of(st.none(), st.tuples(st.integers(0, 10), st.integers(0, 10))),
    st.one_of(st.none(), st.binary(min_size=1, max_size=20)),
)
def test_what_we_send_is_read_by_us_and_by_pynetdicom(
    contexts: list[tuple[str, list[str]]],
    roles: dict[str, tuple[bool, bool]],
    window: tuple[int, int] | None,
    name: bytes | None,
) -> None:
    proposed = tuple(Proposed(2 * n + 1, abstract, tuple(transfer)) for n, (abstract, transfer) in enumerate(contexts))
    identity = UserIdentity(2, True, name, b"secret") if name else None
    user = UserInformation(65536, "1.2.3", "V1", window, roles, {CT: b"\1\0\1"}, (), identity)
    pdu = encode_request(AssociateRequest("CALLED", "CALLING", proposed, user))
    found = decode_request(pdu)
    assert (found.called_aet, found.calling_aet, found.contexts, found.user) == ("CALLED", "CALLING", proposed, user)
    theirs = A_ASSOCIATE_RQ()
    theirs.decode(pdu)
    assert theirs.to_primitive().called_ae_title.strip() == "CALLED"


def test_common_extended_negotiation() -> None:
    def sized(text: str) -> bytes:
        return struct.pack(">H", len(text)) + text.encode()

    related = sized("1.2.3") + sized(CT)
    raw = sized("1.9.9") + sized("1.2.840.10008.4.2") + struct.pack(">H", len(related)) + related
    pdu = request(context(1, b"1.9.9", EXPLICIT.encode()), user=item(0x57, raw))
    assert decode_request(pdu).user.common == (CommonExtended("1.9.9", "1.2.840.10008.4.2", ("1.2.3", CT)),)
    assert accepted(pdu).specialized == {"1.9.9"}


def test_answers_with_items_that_nobody_knows() -> None:
    answer = accepted(request(CT_CONTEXT)).response + item(0x60, b"abcd")
    found = decode_accept(struct.pack(">BxL", 2, len(answer) - 6) + answer[6:])
    assert isinstance(found, AssociateAccept)
    assert [(one.context_id, one.result) for one in found.results] == [(1, 0)]
