"""What is slow or hangs holds up nobody: a line slower than what modalities send, a disk that doesn't answer."""

import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from tests.builders import item
from tests.conftest import wait_for
from tests.system.conftest import SYNC_S, healed, other_than, primary_of, volume_states
from tests.system.writer import Writer
from tools.benchmarks.outage import Probe
from tools.cli.dicom_client import DicomClient
from tools.lab.network import NODES, VIP, inside
from tools.lab.pair import AET, DICOM_PORT, Lab

MBIT = 6
LONG_BYTES = (
    12_000_000  # 16 s of that line: longer than a silent peer is waited for, and than one without acknowledgement
)
ROUNDS = 5
PAUSE_S = 1.0  # of this machine: nothing is known of a round that had one, and of what it did to the pair


@pytest.fixture
def slow_line(lab: Lab) -> Iterator[Lab]:
    """The line to the standby is slow."""
    lab.slow(other_than(primary_of(lab)), MBIT)
    try:
        yield lab
    finally:
        for node in ("a", "b"):
            lab.slow(node, 0)


def links_lost(lab: Lab) -> int:
    return sum((lab.node_dir(node) / "log" / "gateway.log").read_text().count('"link.down"') for node in NODES)


@pytest.mark.timeout(900)
def test_long_objects_over_a_slow_line_leave_the_pair_a_pair(slow_line: Lab) -> None:
    """Nor is the line left for the other one, though it loses a probe now and then."""
    lab = slow_line
    primary = primary_of(lab)
    epoch = (lab.node_status(primary) or {})["epoch"]
    for _ in range(ROUNDS):
        long = item(PixelData=bytes(LONG_BYTES))
        modes: set[str | None] = set()
        before, start = links_lost(lab), time.monotonic()

        def look(answered: Callable[[], None], _stopped: Callable[[], bool], modes: set[str | None] = modes) -> None:
            modes.add((lab.node_status(primary) or {}).get("mode"))
            answered()

        with (
            Probe(look, pause_s=0.1) as probe,
            inside("client"),
            DicomClient(VIP, DICOM_PORT, AET, [(long.sop_class, long.transfer_syntax)], 300) as client,
        ):
            assert client.store(long) == 0
            pause_s = probe.longest_gap_s(start)
        if pause_s < PAUSE_S:
            break
    else:
        pytest.fail(f"this machine stood still in each of {ROUNDS} rounds")
    assert (modes, links_lost(lab) - before) == ({"PAIR"}, 0)
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
