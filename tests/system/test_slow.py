"""A line slower than what modalities send: the pair stays a pair."""

import threading
from collections.abc import Iterator

import pytest

from tests.builders import item
from tests.system.conftest import other_than, primary_of
from tools.cli.dicom_client import DicomClient
from tools.lab.network import VIP, inside
from tools.lab.pair import AET, DICOM_PORT, Lab

MBIT = 32
LONG_BYTES = (
    60_000_000  # 15 s of that line: longer than a silent peer is waited for, and than one without acknowledgement
)


@pytest.fixture
def slow_line(lab: Lab) -> Iterator[Lab]:
    """The line to the standby is slow."""
    lab.slow(other_than(primary_of(lab)), MBIT)
    try:
        yield lab
    finally:
        for node in ("a", "b"):
            lab.slow(node, 0)


@pytest.mark.timeout(900)
def test_long_objects_over_a_slow_line_leave_the_pair_a_pair(slow_line: Lab) -> None:
    lab = slow_line
    primary = primary_of(lab)
    epoch = (lab.node_status(primary) or {})["epoch"]
    made = [item(PixelData=bytes(LONG_BYTES)) for _ in range(2)]
    contexts = [(made[0].sop_class, made[0].transfer_syntax)]
    modes = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            modes.add((lab.node_status(primary) or {}).get("mode"))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with inside("client"), DicomClient(VIP, DICOM_PORT, AET, contexts, 300) as client:
            assert [client.store(one) for one in made] == [0, 0]
    finally:
        done.set()
        watching.join()
    assert modes == {"PAIR"}
    status = lab.node_status(primary) or {}
    assert (status["epoch"], sorted(status["in_sync"])) == (epoch, ["a", "b"])
