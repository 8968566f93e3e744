"""Names in the character sets of PS3.5 (annexes H, I, J and section 6.1.2): stored in one, found in another."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind

from tests.builders import dataset, encoded
from tests.conftest import Gateway
from tools.cli.dicom_client import Object

NAMES = {
    "ISO_IR 100": "Äneas^Rüdiger",
    "ISO_IR 101": "Wałęsa^Lech",
    "ISO_IR 109": "Ħal^Ċensu",
    "ISO_IR 110": "Bērziņš^Jānis",
    "ISO_IR 126": "Διονυσιος",
    "ISO_IR 127": "قباني^لنزار",
    "ISO_IR 138": "שרון^דבורה",
    "ISO_IR 144": "Люкceмбypг",
    "ISO_IR 148": "Çavuşoğlu^Işıl",
    "ISO_IR 166": "สมชาย^ใจดี",
    "ISO_IR 192": "Wang^XiaoDong=王^小东=",
    "GB18030": "Wang^XiaoDong=王^小东=",
    "GBK": "Wang^XiaoDong=王^小东=",
    "ISO_IR 13": "ﾔﾏﾀﾞ^ﾀﾛｳ",
    "\\ISO 2022 IR 87": "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "ISO 2022 IR 13\\ISO 2022 IR 87": "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
    "\\ISO 2022 IR 149": "Hong^Gildong=洪^吉洞=홍^길동",
    "\\ISO 2022 IR 58": "Zhang^XiaoDong=张^小东=",
    "ISO 2022 IR 100\\ISO 2022 IR 144": "Äneas^Люкceмбypг",
}


# pydicom doesn't write the escape sequences of this set; these are the bytes of PS3.5 annex K.
RAW = {"\\ISO 2022 IR 58": b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab="}


def values(character_set: str) -> list[str] | str:
    return character_set.split("\\") if "\\" in character_set else character_set


def stored(gateway: Gateway, character_set: str, name: str) -> str:
    """Stores an instance; returns its Study Instance UID."""
    made = dataset(
        SpecificCharacterSet=values(character_set),
        PatientName=RAW.get(character_set, name),
        StudyInstanceUID=generate_uid(),
    )
    raw = Object(str(made.SOPClassUID), str(made.SOPInstanceUID), str(ExplicitVRLittleEndian), encoded(made))
    with gateway.client(raw) as client:
        assert client.store(raw) == 0
    return str(made.StudyInstanceUID)


def found(gateway: Gateway, character_set: str, name: str) -> dict[str, Dataset]:
    asked = Dataset()
    asked.SpecificCharacterSet = values(character_set)
    asked.QueryRetrieveLevel, asked.PatientName, asked.StudyInstanceUID = "STUDY", RAW.get(character_set, name), ""
    ae = AE()
    ae.add_requested_context(StudyRootQueryRetrieveInformationModelFind)
    association = ae.associate("127.0.0.1", gateway.port, ae_title="TANDEM")
    assert association.is_established
    answers = [answer for _, answer in association.send_c_find(asked, StudyRootQueryRetrieveInformationModelFind)]
    association.release()
    return {str(answer.StudyInstanceUID): answer for answer in answers if answer is not None}


@pytest.mark.parametrize("character_set", NAMES)
def test_a_name_is_found_in_its_own_set_and_in_utf_8(gateway: Gateway, character_set: str) -> None:
    name = NAMES[character_set]
    study = stored(gateway, character_set, name)
    for asked_in in (character_set, "ISO_IR 192"):
        answers = found(gateway, asked_in, name)
        assert study in answers, asked_in
        assert str(answers[study].PatientName).rstrip("=") == name.rstrip("=")
        assert answers[study].SpecificCharacterSet == "ISO_IR 192"


def test_each_group_of_a_name_finds_it(gateway: Gateway) -> None:
    study = stored(gateway, "GB18030", NAMES["GB18030"])
    for asked in ("王^小东", "Wang^Xiao*", "=王*", "wang^xiaodong"):
        assert study in found(gateway, "ISO_IR 192", asked), asked


def test_without_case_and_accents(gateway: Gateway) -> None:
    study = stored(gateway, "ISO_IR 100", NAMES["ISO_IR 100"])
    for asked in ("aneas^rudiger", "ÄNEAS*", "?neas^R?diger"):
        assert study in found(gateway, "ISO_IR 100", asked), asked


def test_the_answer_is_in_the_set_of_the_data_where_the_settings_say_so(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway(TANDEM__DICOM__RESPONSE_CHARACTER_SET='"stored"')
    for character_set in ("ISO_IR 100", "GB18030", "\\ISO 2022 IR 87"):
        study = stored(gateway, character_set, NAMES[character_set])
        answer = found(gateway, "ISO_IR 192", NAMES[character_set])[study]
        said = answer.SpecificCharacterSet
        assert (said if isinstance(said, str) else "\\".join(said)) == character_set
        assert str(answer.PatientName).rstrip("=") == NAMES[character_set].rstrip("=")


def test_a_missing_set_is_that_of_the_settings(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway(TANDEM__DICOM__DEFAULT_CHARACTER_SET='"ISO_IR 101"')
    made = dataset(SpecificCharacterSet="ISO_IR 101", PatientName=NAMES["ISO_IR 101"])
    raw = Object(str(made.SOPClassUID), str(made.SOPInstanceUID), str(ExplicitVRLittleEndian), encoded(made))
    unnamed = replace(raw, data=raw.data[18:])  # without the element itself
    assert raw.data[:4] == b"\x08\x00\x05\x00"
    assert unnamed.data[:4] == b"\x08\x00\x16\x00"
    with gateway.client(unnamed) as client:
        assert client.store(unnamed) == 0
    assert str(made.StudyInstanceUID) in found(gateway, "ISO_IR 192", NAMES["ISO_IR 101"])


@pytest.mark.parametrize("wrong", ["ISO_IR 999", "UTF-8", "ISO 2022 IR 87"])
def test_a_wrong_set_loses_nothing(gateway: Gateway, wrong: str) -> None:
    """Data sets that name a set they aren't in, or one that doesn't exist, are stored and found by their ASCII keys."""
    made = dataset(PatientName="Plain^Name", PatientID=f"W{hash(wrong)}", StudyInstanceUID=generate_uid())
    data = encoded(made)
    element = b"\x08\x00\x05\x00CS" + len(wrong + " " * (len(wrong) % 2)).to_bytes(2, "little")
    data = element + wrong.encode() + b" " * (len(wrong) % 2) + data
    raw = Object(str(made.SOPClassUID), str(made.SOPInstanceUID), str(ExplicitVRLittleEndian), data)
    with gateway.client(raw) as client:
        assert client.store(raw) == 0
    assert str(made.StudyInstanceUID) in found(gateway, "ISO_IR 192", "Plain^Name")
