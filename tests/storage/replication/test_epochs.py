import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.replication.epochs import Epochs


def log(*epochs: int) -> Epochs:
    made = Epochs()
    for seq, epoch in enumerate(epochs, start=1):
        made.append(epoch, seq)
    return made


@given(st.lists(st.integers(1, 4)), st.integers(0, 20))
def test_truncate_keeps_the_prefix(epochs: list[int], seq: int) -> None:
    epochs = sorted(epochs)
    made = log(*epochs)
    made.truncate(seq)
    assert made.pairs == log(*epochs[:seq]).pairs


@pytest.mark.parametrize(
    ("mine", "theirs", "common"),
    [
        ((), (1,), 0),
        ((1, 1), (1,), 1),
        ((1, 1, 2), (1, 1, 1), 2),
        ((1, 1, 3), (1, 1, 2, 2), 2),
        ((1, 2, 2), (1, 2, 2, 2), 3),
        ((2,), (1,), 0),
    ],
)
def test_where_logs_part(mine: tuple[int, ...], theirs: tuple[int, ...], common: int) -> None:
    assert log(*mine).common(log(*theirs)) == common
    assert log(*theirs).common(log(*mine)) == common


def test_holes_and_older_epochs_are_refused() -> None:
    with pytest.raises(ValueError, match="can't follow"):
        log(1).append(1, 3)
    with pytest.raises(ValueError, match="can't follow"):
        log(2).append(1, 2)
