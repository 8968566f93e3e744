"""A line slower than what modalities send, and a disk that doesn't answer: the pair stays a pair, or goes on."""

import threading
from collections.abc import Iterator

import pytest

from tests.builders import item
from tests.conftest import wait_for
from tests.system.conftest import heal, other_than, primary_of
from tests.system.writer import Writer
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


@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", ["primary", "standby"])
def test_a_disk_that_does_not_answer_holds_nobody_up(lab: Lab, which: str) -> None:
    primary = primary_of(lab)
    node = primary if which == "primary" else other_than(primary)
    disks = lab.disks(node)
    with Writer(lab) as writer:
        writer.wait_for_more(10)
        hanging = threading.Thread(target=disks.stall, args=(1, 40.0))
        hanging.start()
        try:
            writer.wait_for_more(20)
            assert hanging.is_alive(), "the disk has come back before anything was stored"
        finally:
            hanging.join()
        writer.wait_for_more(10)
    wait_for(lambda: states(lab, node) == {"online"}, "the disk to be taken back", 120)
    heal(lab)
    writer.check()


def states(lab: Lab, node: str) -> set[str]:
    return {volume["state"] for volume in (lab.node_status(node) or {})["volumes"]}
