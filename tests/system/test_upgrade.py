"""A pair is brought from the version before to this one, node by node, while a modality sends: nothing is lost, and the
two versions work together either way round.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, wait_for
from tests.system.conftest import DISK_MB, SYNC_S, TTL_S, VOLUMES, healed, other_than, primary_of, renew
from tests.system.test_disks import verified
from tests.system.test_newcomer import far_behind, taken
from tests.system.test_switchover import tandem
from tests.system.writer import Writer
from tools.lab.pair import Lab

BEFORE = "3c6f4320bca1dab39999ae8b1e0840bd717ad696"  # catalogue format 4, what a node can carry out: 4


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """The source tree of the version before."""
    packed = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, capture_output=True, check=False)
    if packed.returncode:
        pytest.skip("without the repository's history there is no version before")
    subprocess.run(["tar", "x", "-C", str(tmp_path)], input=packed.stdout, check=True)
    return tmp_path


@pytest.fixture
def old_pair(running_lab: Lab, before: Path) -> Iterator[Lab]:
    running_lab.down(keep_data=False)
    running_lab.dir.mkdir(exist_ok=True)
    try:
        running_lab.up(TTL_S, VOLUMES, DISK_MB, version=before)
        yield running_lab
    finally:
        renew(running_lab)


def converted(lab: Lab, node: str) -> bool:
    """Whether a node has converted its catalogue."""
    return '"catalogue.converting"' in (lab.node_dir(node) / "log" / "gateway.log").read_text()


def upgrade(lab: Lab, node: str, writer: Writer, *, state: bool) -> None:
    """`state`: it stays away for so long that it takes the other one's state."""
    count = taken(lab, node)
    lab.power_off(node)
    lab.use_version(node, None, files=False)
    writer.wait_for_more(far_behind(lab) if state else 10)
    lab.power_on(node)
    wait_for(lab.in_sync, "the pair to be in sync", SYNC_S)
    if state:
        wait_for(lambda: taken(lab, node) > count, "the state to be taken")
    wait_for(lambda: healed(lab), "every copy to be there", SYNC_S)


@pytest.mark.parametrize("state", [False, True])
def test_rolling_upgrade(old_pair: Lab, state: bool) -> None:
    lab = old_pair
    first = other_than(primary_of(lab))
    second = other_than(first)
    with Writer(lab) as writer:
        writer.wait_for_more(30)
        upgrade(lab, first, writer, state=state)
        writer.wait_for_more(20)  # the new one follows the old one
        code, output = tandem(lab, first, "switchover", "--to", first)
        assert code == 0, output
        wait_for(lambda: lab.primary() == first, "the new version to lead")
        writer.wait_for_more(20)  # the old one follows the new one
        if state:
            lab.power_off(second)  # and takes its state
            count = taken(lab, second)
            writer.wait_for_more(far_behind(lab))
            lab.power_on(second)
            wait_for(lambda: taken(lab, second) > count, "the old version to take the state")
            wait_for(lab.in_sync, "the pair to be in sync", SYNC_S)
        upgrade(lab, second, writer, state=False)
        writer.wait_for_more(20)
    assert converted(lab, first)
    assert converted(lab, second)
    wait_for(lambda: healed(lab), "every copy to be there", SYNC_S)
    writer.check()
    verified(lab)
