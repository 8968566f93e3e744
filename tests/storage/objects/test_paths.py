from pathlib import PurePosixPath

from hypothesis import given
from hypothesis import strategies as st

from storage.objects import paths


@given(st.text(max_size=1200))
def test_a_component_is_safe(text: str) -> None:
    made = paths.component(text, "NONE")
    assert made not in ("", ".", "..")
    assert len(PurePosixPath(made).parts) == 1
    assert len(made.encode()) <= 80
    assert not set(made) & set('\0\n\r/\\:*?"<>|')
    assert not made.endswith((".", " "))


@given(st.text(max_size=100), st.text(max_size=100))
def test_different_names_stay_different(first: str, second: str) -> None:
    if first.strip() != second.strip() and first.strip() and second.strip():
        assert paths.component(first, "NONE") != paths.component(second, "NONE")


def test_plain_names_stay_as_they_are() -> None:
    assert paths.component("12345", "NONE") == "12345"
    assert paths.study_folder("1.2.840.113619.2.5", "20260101", "CT").startswith("20260101_CT_")
