import pytest
from pydicom import Dataset

from gateway.find import BadQuery, Query, matcher


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
        ("PN", "DOE^john", "Doe^John", True),
        ("PN", "doe*", "Doe^John", True),
        ("PN", "Doe", "Doe^^", True),
        ("PN", "Doe", "Doe^John", False),
        ("UI", "1.2\\1.3", "1.3", True),
        ("UI", "1.2\\1.3", "1.33", False),
        ("DA", "20260101-20260131", "20260131", True),
        ("DA", "20260101-20260131", "20260201", False),
        ("DA", "-20260131", "20250101", True),
        ("DA", "20260101-", "20260101", True),
        ("DA", "20260101-", "", False),
        ("TM", "08-09", "091500.25", True),
        ("CS", "MR", "CT\\MR", True),
    ],
)
def test_matching(vr: str, wanted: str, text: str, matches: bool) -> None:
    assert matcher(vr, "X", wanted)(text) is matches


def identifier(**values: str) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"QueryRetrieveLevel": "PATIENT"},
        {"QueryRetrieveLevel": "SERIES"},
        {"QueryRetrieveLevel": "IMAGE", "StudyInstanceUID": "1.2"},
        {"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": "1.2\\1.3"},
    ],
)
def test_identifiers_that_do_not_fit(bad: dict[str, str]) -> None:
    with pytest.raises(BadQuery):
        Query(identifier(**bad), "TANDEM")
