"""What is slow or hangs holds up nobody: a line slower than what modalities send, a disk that doesn't answer."""

import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests.builders import item
from tests.conftest import wait_for
from tests.system.conftest import SYNC_S, healed, other_than, primary_of, volume_states
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
def test_images_are_stored_while_a_disk_hangs(lab: Lab, which: str) -> None:
    """All of them by way of the other disk, and nobody takes over; afterwards the disk is used as before."""
    primary = primary_of(lab)
    node = primary if which == "primary" else other_than(primary)
    epoch = (lab.node_status(primary) or {})["epoch"]

    def hung() -> bool:
        return any(state.startswith("hung") for state in volume_states(lab, node))

    with Writer(lab) as writer:
        held = wait_for(lambda: list(writer.files_on(node).values()), "an image to be published")
        disk = next(volume for volume in lab.volumes(node) if held[0].is_relative_to(volume))
        subprocess.run(["fsfreeze", "-f", str(disk)], check=True)
        try:
            wait_for(hung, "it to be noticed", SYNC_S)
            writer.wait_for_more(20)
        finally:
            subprocess.run(["fsfreeze", "-u", str(disk)], check=True)
        wait_for(lambda: not hung(), "the disk to come back", SYNC_S)
        writer.wait_for_more(5)
    assert (lab.node_status(primary) or {})["epoch"] == epoch
    wait_for(lambda: healed(lab), "every copy to be there", SYNC_S)
    writer.check()
