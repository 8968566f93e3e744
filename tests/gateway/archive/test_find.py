"""C-FIND against a plain reference: every key, level and kind of matching, on made-up archives."""

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset

from conf.settings import DicomSettings
from gateway.archive.answers import Query
from gateway.archive.find import LEVEL_OF, Extended
from gateway.archive.select import instances, wanted
from gateway.dicom.elements import encoded_text
from gateway.dicom.identifiers import BadQuery, encode_identifier
from gateway.dicom.matching import matcher, matches_element
from gateway.dicom.sop_classes import PATIENT_ROOT, PATIENT_STUDY_ONLY, STUDY_ROOT, Model
from storage.state.catalogue import Batch, Catalogue
from storage.state.model import Delete, Entry, Location, Put
from tests.conftest import FUZZ
from tests.simulation.machine import MemoryKv


@pytest.mark.parametrize(
    ("vr", "wanted", "text", "matches"),
    [
        ("LO", "", "x", True),
        ("LO", "*", "", True),
        ("LO", "abc", "abc", True),
        ("LO", "abc", "ABC", False),
        ("LO", "a*c", "abbc", True),
        ("LO", "a?c", "abbc", False),
        ("LO", "a[b]", "ab", False),
        ("LO", "a[b*", "a[bc", True),
        ("LO", "?*", "", False),
        ("PN", "DOE^john", "Doe^John", True),
        ("PN", "doe*", "Doe^John", True),
        ("PN", "Doe", "Doe^^", True),
        ("PN", "Doe", "Doe^John", False),
        ("PN", "aneas^rudiger", "Äneas^Rüdiger", True),
        ("PN", "ÄNEAS*", "Äneas^Rüdiger", True),
        ("PN", "王^小东", "Wang^XiaoDong=王^小东=", True),
        ("PN", "Wang^XiaoDong", "Wang^XiaoDong=王^小东=", True),
        ("PN", "=王*", "Wang^XiaoDong=王^小东=", True),
        ("PN", "=Wang*", "Wang^XiaoDong=王^小东=", False),
        ("PN", "やまだ^たろう", "Yamada^Tarou=山田^太郎=やまだ^たろう", True),
        ("UI", "1.2\\1.3", "1.3", True),
        ("UI", "1.2\\1.3", "1.33", False),
        ("DA", "20260101", "2026.01.01", True),
        ("DA", "20260101-20260131", "20260131", True),
        ("DA", "20260101-20260131", "20260201", False),
        ("DA", "-20260131", "20250101", True),
        ("DA", "20260101-", "20260101", True),
        ("DA", "20260101-", "", False),
        ("TM", "08-09", "091500.25", True),
        ("TM", "0915", "091500.25", True),
        ("TM", "09:15", "0915", True),
        ("TM", "103000-110000", "1030", True),
        ("TM", "103000-", "1030", True),
        ("TM", "103000", "1030", True),
        ("TM", "100000-120000", "10", True),
        ("TM", "093100-", "0930", False),
        ("LO", "\\", "anything", True),
        ("LO", "*a*a*b", "xaxaxb", True),
        ("LO", "*a*a*b", "xaxb", False),
        ("LO", "a*?b", "ab", False),
        ("LO", "a*a", "a", False),
        ("PN", "か", "が", False),
        ("PN", "и", "й", False),
        ("PN", "หน", "หนู", False),
        ("PN", "ｶﾞ", "ガ", True),
        ("TM", "0915-", "0914", False),
        ("DT", "2020-2021", "20210303101500", True),
        ("DT", "20200101-0500", "20200101", True),
        ("IS", "1", "01", True),
        ("IS", "1", "2", False),
        ("CS", "MR", "CT\\MR", True),
        ("CS", "MR\\US", "US", True),
    ],
)
def test_matching(vr: str, wanted: str, text: str, matches: bool) -> None:
    assert matcher(vr, wanted)(text) is matches


@pytest.mark.parametrize(
    ("names", "wanted", "matches"),
    [
        ("exact", "doe^john", False),
        ("exact", "Doe^John", True),
        ("folded", "doe^john", True),
        ("folded", "john", False),
        ("fuzzy", "jo do", True),
        ("fuzzy", "jane doe", False),
    ],
)
def test_names_compare_as_the_settings_say(names: str, wanted: str, matches: bool) -> None:
    assert matcher("PN", wanted, names)("Doe^John") is matches


def test_a_sequence_is_no_number_and_a_long_list_no_short_value() -> None:
    key, found = Dataset(), Dataset()
    key.add_new(0x00280101, "SQ", [identifier(PatientID="1")])
    found.BitsStored = 12
    assert not matches_element(key[0x00280101], found, "folded")
    assert encoded_text("UI", "\\".join(["1.2.3"] * 11_000)) is None
    assert encoded_text("UI", "\\".join(["1.2.3"] * 10_000)) is not None


# -- models ------------------------------------------------------------------------------------------------------------


def identifier(**values: Any) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


class Answers(Query):
    """Without the pauses."""

    def run(self) -> Iterator[Dataset]:
        return (answer for answer in super().run() if answer is not None)


def query(
    asked: Dataset,
    model: Model = STUDY_ROOT,
    catalogue: Catalogue | None = None,
    settings: DicomSettings | None = None,
    **extended: bool,
) -> Query:
    made = catalogue or Catalogue(MemoryKv())
    return Answers(asked, model, settings or DicomSettings(), Extended(**extended), made, lambda instance: None)


@pytest.mark.parametrize(
    ("model", "bad"),
    [
        (STUDY_ROOT, {}),
        (STUDY_ROOT, {"QueryRetrieveLevel": "PATIENT"}),
        (STUDY_ROOT, {"QueryRetrieveLevel": "SERIES"}),
        (STUDY_ROOT, {"QueryRetrieveLevel": "IMAGE", "StudyInstanceUID": "1.2"}),
        (STUDY_ROOT, {"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": "1.2\\1.3"}),
        (PATIENT_ROOT, {"QueryRetrieveLevel": "STUDY"}),
        (PATIENT_ROOT, {"QueryRetrieveLevel": "STUDY", "PatientID": "A*"}),
        (PATIENT_STUDY_ONLY, {"QueryRetrieveLevel": "SERIES", "PatientID": "A", "StudyInstanceUID": "1.2"}),
    ],
)
def test_identifiers_that_do_not_fit(model: Model, bad: dict[str, str]) -> None:
    with pytest.raises(BadQuery):
        query(identifier(**bad), model, settings=DicomSettings(relational_queries=False))


def test_unique_keys_above_may_be_left_out_unless_the_settings_say_otherwise() -> None:
    catalogue = conflicting()
    for asked in (
        {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": "1.1"},
        {"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": "1.1\\1.9"},
        {"QueryRetrieveLevel": "SERIES", "SeriesInstanceUID": "1.1.1"},
    ):
        answers = list(query(identifier(**asked), PATIENT_ROOT, catalogue).run())
        assert [answer.StudyInstanceUID for answer in answers] == ["1.1"]
    asked = identifier(QueryRetrieveLevel="IMAGE", SOPInstanceUID="1.1.1.2")
    assert [answer.PatientID for answer in query(asked, PATIENT_ROOT, catalogue).run()] == ["REAL1"]


# -- more than one patient in a study ----------------------------------------------------------------------------------


def instance(number: int, patient: str, study: str = "1.1", **keys: str) -> dict[str, str]:
    return {
        "SOPInstanceUID": f"{study}.1.{number}",
        "StudyInstanceUID": study,
        "SeriesInstanceUID": f"{study}.1",
        "PatientID": patient,
        "Modality": "CT",
        **keys,
    }


def conflicting() -> Catalogue:
    return catalogue_of([instance(1, "TMP1"), instance(2, "REAL1"), instance(3, "REAL1")])


def counts(catalogue: Catalogue, level: str, **asked: str) -> list[tuple[str, int]]:
    name = "NumberOfPatientRelatedInstances" if level == "PATIENT" else "NumberOfStudyRelatedInstances"
    asking = identifier(QueryRetrieveLevel=level, **{"PatientID": "", name: None, **asked})
    return sorted((answer.PatientID, answer[name].value) for answer in query(asking, PATIENT_ROOT, catalogue).run())


def fetched(catalogue: Catalogue, level: str, **asked: str) -> list[str]:
    found = wanted(identifier(QueryRetrieveLevel=level, **asked), PATIENT_ROOT)
    return sorted(one.put.sop_instance for one in instances(catalogue, found))


def test_a_study_that_names_two_patients_is_found_under_both_and_never_mixed() -> None:
    catalogue = conflicting()
    assert catalogue.counts()["conflicts"] == 1
    assert catalogue.conflicts(10) == ["1.1"]
    for patient, uids in (("TMP1", ["1.1.1.1"]), ("REAL1", ["1.1.1.2", "1.1.1.3"])):
        assert counts(catalogue, "STUDY", PatientID=patient) == [(patient, len(uids))]
        assert counts(catalogue, "PATIENT", PatientID=patient) == [(patient, len(uids))]
        assert fetched(catalogue, "PATIENT", PatientID=patient) == uids
        assert fetched(catalogue, "STUDY", PatientID=patient, StudyInstanceUID="1.1") == uids
    assert counts(catalogue, "STUDY", StudyInstanceUID="1.1") == [("TMP1", 3)]
    assert len(fetched(catalogue, "STUDY", StudyInstanceUID="1.1")) == 3
    assert counts(catalogue, "PATIENT") == [("REAL1", 2), ("TMP1", 1)]


def test_a_conflict_ends_when_the_instance_that_made_it_goes() -> None:
    catalogue = conflicting()
    gone = Entry(1, 4, Delete("1.1", "1.1.1", "1.1.1.1", "wrong patient", "test", 0.0))
    catalogue.write(Batch(appends=[(gone, None)], applies=[(gone, None)]))
    assert catalogue.counts()["conflicts"] == 0
    assert counts(catalogue, "STUDY", StudyInstanceUID="1.1") == [("REAL1", 2)]
    assert counts(catalogue, "STUDY", PatientID="TMP1") == []


def test_one_patient_id_of_two_issuers_is_two_patients() -> None:
    catalogue = catalogue_of(
        [
            instance(1, "7", "1.1", IssuerOfPatientID="NORTH", PatientName="Alice"),
            instance(1, "7", "1.2", IssuerOfPatientID="SOUTH", PatientName="Bob"),
        ]
    )
    names = {"PatientName": ""}
    asked = identifier(QueryRetrieveLevel="PATIENT", PatientID="7", IssuerOfPatientID="", **names)
    answers = {str(one.IssuerOfPatientID): str(one.PatientName) for one in query(asked, PATIENT_ROOT, catalogue).run()}
    assert answers == {"NORTH": "Alice", "SOUTH": "Bob"}
    with pytest.raises(BadQuery, match="issuer"):
        fetched(catalogue, "PATIENT", PatientID="7")
    assert fetched(catalogue, "PATIENT", PatientID="7", IssuerOfPatientID="SOUTH") == ["1.2.1.1"]
    assert catalogue.counts()["conflicts"] == 0


def test_what_came_first_and_said_less_is_filled_up() -> None:
    catalogue = catalogue_of([instance(1, "7"), instance(2, "7", StudyDescription="Thorax", PatientName="Doe^Jane")])
    row = catalogue.study("1.1")
    assert row is not None
    assert (row.keys["StudyDescription"], row.keys["PatientName"]) == ("Thorax", "Doe^Jane")


def test_a_patient_is_answered_as_in_the_newest_study_that_matches() -> None:
    catalogue = catalogue_of(
        [
            instance(1, "7", "1.9", PatientName="Alice^Old", StudyDate="20200101"),
            instance(1, "7", "1.2", PatientName="Alice^New", StudyDate="20250101"),
        ]
    )
    asked = identifier(QueryRetrieveLevel="PATIENT", PatientName="Alice*")
    assert [str(one.PatientName) for one in query(asked, PATIENT_ROOT, catalogue).run()] == ["Alice^New"]
    asked = identifier(QueryRetrieveLevel="PATIENT", PatientName="*Old")
    assert [str(one.PatientName) for one in query(asked, PATIENT_ROOT, catalogue).run()] == ["Alice^Old"]


def test_one_bad_value_never_ends_a_query() -> None:
    catalogue = catalogue_of([instance(1, "7", InstanceNumber="1A"), instance(2, "7", InstanceNumber="2")])
    asked = identifier(QueryRetrieveLevel="IMAGE", InstanceNumber="", SOPInstanceUID="")
    assert len(list(query(asked, STUDY_ROOT, catalogue).run())) == 2


def test_relational_queries_need_no_unique_keys_above() -> None:
    asked = identifier(QueryRetrieveLevel="IMAGE", SOPInstanceUID="1.2.3")
    assert list(query(asked, relational=True).run()) == []


def test_keys_of_lower_levels_are_told() -> None:
    assert query(identifier(QueryRetrieveLevel="STUDY", SOPInstanceUID="1.2.3")).ignored == ["SOPInstanceUID"]


# -- against a reference -----------------------------------------------------------------------------------------------

PATIENTS = {
    "P1": "Doe^John",
    "P2": "Äneas^Rüdiger",
    "P3": "Wang^XiaoDong=王^小东=",
    "P4": "",
}
BORN = {"P1": "19600115", "P2": "19600116", "P3": "1960", "P4": ""}
TEXT = {  # keyword -> (level, values that occur, patterns that are asked for)
    "PatientID": ("PATIENT", [*PATIENTS], ["P1", "P*", "P?", "p1", "Q"]),
    "PatientName": ("PATIENT", [*PATIENTS.values()], ["doe^john", "DOE*", "aneas*", "王^小东", "*^john", "?oe*", "x"]),
    "PatientBirthDate": (
        "PATIENT",
        [*BORN.values()],
        ["19600115", "19600101-19600115", "19600116-", "-19591231", "1960", "19600115-1960"],
    ),
    "StudyDate": (
        "STUDY",
        ["20260101", "20260115", "20251231", ""],
        ["20260101", "20260101-", "-20260110", "20251201-20260101"],
    ),
    "StudyTime": ("STUDY", ["081500", "101530.5", "2359", ""], ["08", "0815-1015", "-09", "1000-"]),
    "AccessionNumber": ("STUDY", ["A1", "A2", ""], ["A1", "A*", "a1", "?1"]),
    "StudyDescription": ("STUDY", ["Head [CT]", "head", ""], ["Head*", "Head [CT]", "*[*", "????"]),
    "Modality": ("SERIES", ["CT", "MR", "SR"], ["CT", "MR\\SR", "*R", "ct"]),
    "SeriesNumber": ("SERIES", ["1", "01", "12", ""], ["1", "12", "3"]),
    "SeriesDescription": ("SERIES", ["axial", "a.b", ""], ["a?b", "a*", "AXIAL"]),
    "InstanceNumber": ("IMAGE", ["1", "2", ""], ["1", "2", "02"]),
    "ContentDate": ("IMAGE", ["20260101", "20260303", ""], ["20260101-20260201", "20260303"]),
}
LEVELS = ("PATIENT", "STUDY", "SERIES", "IMAGE")
UNIQUE = {"PATIENT": "PatientID", "STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}


@st.composite
def archives(draw: st.DrawFn) -> list[dict[str, str]]:
    """Instances as flat attributes; those of one series, study and patient agree."""
    found = []
    for study in range(draw(st.integers(1, 5))):
        patient = draw(st.sampled_from([*PATIENTS]))
        of_study = {"PatientID": patient, "PatientName": PATIENTS[patient], "StudyInstanceUID": f"1.{study + 1}"}
        of_study |= {"PatientBirthDate": BORN[patient], **_drawn(draw, "STUDY")}
        for series in range(draw(st.integers(1, 3))):
            of_series = {**of_study, "SeriesInstanceUID": f"1.{study + 1}.{series + 1}", **_drawn(draw, "SERIES")}
            for number in range(draw(st.integers(1, 3))):
                uid = f"1.{study + 1}.{series + 1}.{number + 1}"
                found.append({**of_series, "SOPInstanceUID": uid, **_drawn(draw, "IMAGE")})
    return found


def _drawn(draw: st.DrawFn, level: str) -> dict[str, str]:
    return {
        key: draw(st.sampled_from(values))
        for key, (of, values, _) in TEXT.items()
        if of == level and level != "PATIENT"
    }


def catalogue_of(archive: list[dict[str, str]]) -> Catalogue:
    made = Catalogue(MemoryKv())
    for seq, one in enumerate(archive, 1):
        kept = {key: value for key, value in one.items() if value and key != "SOPInstanceUID"}
        put = Put(
            one["SOPInstanceUID"], "1.2.840.10008.5.1.4.1.1.2", one["StudyInstanceUID"], one["SeriesInstanceUID"],
            "1.2.840.10008.1.2.1", b"", 100, 10, kept, "AE", 0.0,
        )  # fmt: skip
        entry = Entry(1, seq, put)
        made.write(Batch(appends=[(entry, None)], applies=[(entry, Location("v", f"s{seq}", f"{seq}.dcm"))]))
    return made


@st.composite
def queries(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    level = draw(st.sampled_from(LEVELS))
    above = LEVELS[: LEVELS.index(level) + 1]
    usable = [key for key, (of, _, _) in TEXT.items() if of in above]
    chosen = draw(st.lists(st.sampled_from(usable), max_size=3, unique=True))
    asked = {key: draw(st.sampled_from(["", *TEXT[key][2]])) for key in chosen}
    for one in ("STUDY", "SERIES"):
        if one in above and draw(st.booleans()):
            asked[UNIQUE[one]] = draw(st.sampled_from(["1.1", "1.1\\1.2", "1.1.1", "1.2.1\\1.1.1", "9"]))
    return level, asked


def reference(archive: list[dict[str, str]], level: str, asked: dict[str, str]) -> set[str]:
    """The unique keys of the entities that match, told as plainly as can be."""
    return {
        one[UNIQUE[level]]
        for one in archive
        if all(_fits(key, value, one.get(key, "")) for key, value in asked.items())
    }


def _fits(key: str, wanted: str, has: str) -> bool:
    if wanted in ("", "*"):
        return True
    if key.endswith("UID"):
        return has in wanted.split("\\")
    if key.endswith(("Date", "Time")):
        low, dash, high = wanted.partition("-")
        high = high if dash else low
        return bool(has) and (not low or has >= low[: len(has)]) and (not high or has[: len(high)] <= high)
    if key.endswith("Number") and key != "AccessionNumber":
        return has != "" and int(has) == int(wanted)
    if key == "PatientName":
        return any(_wild(_plain(wanted), _plain(group)) for group in has.split("=") if group)
    return any(_wild(one, has) for one in wanted.split("\\"))


def _plain(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c)).rstrip(
        "^"
    )


def _wild(wanted: str, has: str) -> bool:
    pattern = "".join({"*": ".*", "?": "."}.get(char, re.escape(char)) for char in wanted)
    return bool(has) and re.fullmatch(pattern, has) is not None


@settings(max_examples=400 * FUZZ, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(archives(), queries())
def test_answers_are_those_of_the_reference(archive: list[dict[str, str]], asked: tuple[str, dict[str, str]]) -> None:
    level, values = asked
    made = query(identifier(QueryRetrieveLevel=level, **values), PATIENT_ROOT, catalogue_of(archive), relational=True)
    answers = list(made.run())
    found = [str(answer[UNIQUE[level]].value or "") for answer in answers]
    assert sorted(found) == sorted(reference(archive, level, values))
    for answer in answers:
        one = next(one for one in archive if one[UNIQUE[level]] == answer[UNIQUE[level]].value)
        for key in values:
            if LEVEL_OF[key] in LEVELS[: LEVELS.index(level) + 1] and LEVEL_OF[key] == level:
                assert str(answer[key].value or "") == one.get(key, "").rstrip("=")


ODD = {
    "PatientName": ["Wang^XiaoDong=王^小东", "Doe^John=", " Doe", "x" * 70, "a\\b", "Doe^\x1b"],
    "StudyID": ["1", "x" * 17, "a\\b", "é"],
    "StudyDate": ["20260101", "2026.01.01", "x", "20260101\\20260102"],
    "StudyTime": ["1030", "10", "103000.123456", "9:15"],
    "PatientWeight": ["70.5", "70,5", "1e3", "007", "-0"],
    "PatientAge": ["034Y", "34"],
    "PatientSex": ["F", "female"],
}


@settings(max_examples=200 * FUZZ, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in ODD.items()}),
    st.sampled_from(["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"]),
    st.sampled_from(LEVELS),
)
def test_answers_are_encoded_as_pydicom_does(kept: dict[str, str], syntax: str, level: str) -> None:
    uids = {"StudyInstanceUID": "1.1", "SeriesInstanceUID": "1.1.1", "SOPInstanceUID": "1.1.1.1"}
    plain = {"PatientID": "P1", "Modality": "CT", "SeriesNumber": "3", "Rows": "512"}
    catalogue = catalogue_of([{**plain, **uids, **kept}])
    computed = dict.fromkeys(("ModalitiesInStudy", "NumberOfStudyRelatedSeries", "SOPClassesInStudy"), "")
    asked = identifier(QueryRetrieveLevel=level, **dict.fromkeys((*ODD, *plain), ""), **computed)
    made = query(asked, PATIENT_ROOT, catalogue, relational=True)
    (row,) = [one for one in made.matches() if one is not None]
    encoded = made.encoded(row, syntax)
    if encoded is not None:
        assert encoded == encode_identifier(made.answer(row), syntax)
    ordinary = not any(text in kept.values() for texts in ODD.values() for text in texts[1:])
    assert (encoded is not None) or not ordinary or syntax.endswith(".2.2")


@settings(max_examples=100 * FUZZ, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(archives())
def test_computed_keys_count(archive: list[dict[str, str]]) -> None:
    catalogue = catalogue_of(archive)
    asked = identifier(
        QueryRetrieveLevel="SERIES",
        PatientID="",
        NumberOfPatientRelatedStudies=None,
        NumberOfPatientRelatedSeries=None,
        NumberOfPatientRelatedInstances=None,
        NumberOfStudyRelatedSeries=None,
        NumberOfStudyRelatedInstances=None,
        NumberOfSeriesRelatedInstances=None,
        ModalitiesInStudy="",
        SOPClassesInStudy="",
    )
    for answer in query(asked, PATIENT_ROOT, catalogue, relational=True).run():
        of_patient = [one for one in archive if one["PatientID"] == answer.PatientID]
        of_study = [one for one in archive if one["StudyInstanceUID"] == answer.StudyInstanceUID]
        of_series = [one for one in of_study if one["SeriesInstanceUID"] == answer.SeriesInstanceUID]

        def distinct(rows: list[dict[str, str]], key: str) -> int:
            return len({row[key] for row in rows})

        assert answer.NumberOfPatientRelatedStudies == distinct(of_patient, "StudyInstanceUID")
        assert answer.NumberOfPatientRelatedSeries == distinct(of_patient, "SeriesInstanceUID")
        assert answer.NumberOfPatientRelatedInstances == len(of_patient)
        assert answer.NumberOfStudyRelatedSeries == distinct(of_study, "SeriesInstanceUID")
        assert answer.NumberOfStudyRelatedInstances == len(of_study)
        assert answer.NumberOfSeriesRelatedInstances == len(of_series)
        modalities = answer.ModalitiesInStudy
        modalities = [modalities] if isinstance(modalities, str) else list(modalities)
        assert modalities == sorted({one["Modality"] for one in of_study})
        assert answer.SOPClassesInStudy == "1.2.840.10008.5.1.4.1.1.2"
        assert (answer.InstanceAvailability, answer.RetrieveAETitle) == ("ONLINE", "TANDEM")


def test_date_and_time_are_one_range_where_that_was_negotiated() -> None:
    def one(number: int, date: str, time: str) -> dict[str, str]:
        uids = {
            "StudyInstanceUID": f"1.{number}",
            "SeriesInstanceUID": f"1.{number}.1",
            "SOPInstanceUID": f"1.{number}.1.1",
        }
        return {"PatientID": "P1", "StudyDate": date, "StudyTime": time, **uids}

    catalogue = catalogue_of([one(1, "20260101", "2300"), one(2, "20260102", "0100"), one(3, "20260102", "2300")])
    asked = identifier(QueryRetrieveLevel="STUDY", StudyDate="20260101-20260102", StudyTime="2200-0200")
    apart = [answer.StudyInstanceUID for answer in query(asked, catalogue=catalogue).run()]
    together = [answer.StudyInstanceUID for answer in query(asked, catalogue=catalogue, date_time=True).run()]
    assert apart == []
    assert together == ["1.2", "1.1"]  # the newest first


@given(st.text("ab*?", max_size=12), st.text("ab", max_size=16))
def test_wild_cards_are_those_of_the_reference(wanted: str, text: str) -> None:
    if wanted.strip("*"):
        assert matcher("LO", wanted)(text) == _wild(wanted, text)


def test_many_stars_take_no_longer() -> None:
    assert not matcher("LO", "*a" * 30 + "*b")("a" * 64)  # backtracking would not end


def test_a_number_that_is_none_is_returned_without_value() -> None:
    one = {
        "StudyInstanceUID": "1.1",
        "SeriesInstanceUID": "1.1.1",
        "SOPInstanceUID": "1.1.1.1",
        "PatientWeight": "70,5",
    }
    asked = identifier(QueryRetrieveLevel="STUDY", PatientWeight=None, StudyInstanceUID="")
    (answer,) = query(asked, catalogue=catalogue_of([{"PatientID": "P1", **one}])).run()
    assert answer.StudyInstanceUID == "1.1"
    assert answer.PatientWeight is None
