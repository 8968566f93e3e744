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
from gateway.archive.find import LEVEL_OF, Extended, Query
from gateway.dicom.identifiers import BadQuery
from gateway.dicom.matching import matcher
from gateway.dicom.sop_classes import PATIENT_ROOT, PATIENT_STUDY_ONLY, STUDY_ROOT, Model
from storage.state.catalogue import Batch, Catalogue
from storage.state.model import Entry, Location, Put
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


def query(asked: Dataset, model: Model = STUDY_ROOT, catalogue: Catalogue | None = None, **extended: bool) -> Query:
    made = catalogue or Catalogue(MemoryKv())
    return Answers(asked, model, DicomSettings(), Extended(**extended), made, lambda instance: None)


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
        query(identifier(**bad), model)


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
TEXT = {  # keyword -> (level, values that occur, patterns that are asked for)
    "PatientID": ("PATIENT", [*PATIENTS], ["P1", "P*", "P?", "p1", "Q"]),
    "PatientName": ("PATIENT", [*PATIENTS.values()], ["doe^john", "DOE*", "aneas*", "王^小东", "*^john", "?oe*", "x"]),
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
        of_study |= _drawn(draw, "STUDY")
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
        return bool(has) and (not low or has >= low) and (not high or has[: len(high)] <= high)
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


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
    assert together == ["1.1", "1.2"]


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
