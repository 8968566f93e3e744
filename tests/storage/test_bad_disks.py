"""Disks that hang and disks that are full, under a gateway by itself, on file systems of their own."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.objects.local_volume import create_marker
from tests.builders import dataset, encoded, item
from tests.conftest import Gateway, wait_for
from tools.cli.dicom_client import AssociationFailed, DicomClient, Object
from tools.lab.disks import Disks

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for loop devices")
SIZE_MB = 160
OUT_OF_RESOURCES = 0xA700


class TwoDisks:
    """A standalone gateway whose state and two volumes are file systems of their own."""

    def __init__(self, folder: Path, start: Callable[..., Gateway]) -> None:
        self.disks = Disks(folder, SIZE_MB)
        self.disks.create(2)
        self.paths = [folder / "volumes" / f"disk{number}" for number in (1, 2)]
        self.state = folder / "state"
        listed = ", ".join(f'"{path}"' for path in self.paths)
        self.gateway = start(
            TANDEM__STORAGE__VOLUMES=f"[{listed}]",
            TANDEM__STORAGE__STATE=f'"{self.state}"',
            TANDEM__STORAGE__HANG_S="2.0",
            TANDEM__STORAGE__RESERVE_BYTES=str(8 << 20),
            TANDEM__STORAGE__MAP_SIZE_BYTES=str(32 << 20),
        )

    def states(self) -> list[str]:
        return [str(row["state"]) for row in self.gateway.status()["nodes"]["standalone"]["volumes"]]


@pytest.fixture
def disks(tmp_path: Path, new_gateway: Callable[..., Gateway]) -> Iterator[TwoDisks]:
    made: list[TwoDisks] = []
    try:
        made.append(TwoDisks(tmp_path / "disks", new_gateway))
        yield made[0]
    finally:
        for one in made:
            for path in (*one.paths, one.state):
                subprocess.run(["fsfreeze", "-u", str(path)], capture_output=True)
            one.gateway.stop(9)
        Disks(tmp_path / "disks", SIZE_MB).unmount()


def freeze(path: Path, *, thaw: bool = False) -> None:
    subprocess.run(["fsfreeze", "-u" if thaw else "-f", str(path)], check=True)


def store(gateway: Gateway, raw: Object) -> int | None:
    """The status, None if the association was cut."""
    try:
        with DicomClient("127.0.0.1", gateway.port, "TANDEM", [(raw.sop_class, raw.transfer_syntax)], 60) as client:
            return client.store(raw)
    except (AssociationFailed, OSError):
        return None


def large() -> Object:
    made = dataset(PixelData=bytes(3 << 20))
    return Object(str(made.SOPClassUID), str(made.SOPInstanceUID), "1.2.840.10008.1.2.1", encoded(made))


@pytest.mark.parametrize("which", [0, 1])
def test_a_disk_that_hangs_is_left_for_another(disks: TwoDisks, which: int) -> None:
    """Every sender has an answer, what is acknowledged is there, and the disk comes back by itself."""
    gateway = disks.gateway
    acknowledged = []
    freeze(disks.paths[which])
    try:
        for number in range(12):
            raw = item() if number % 3 else large()
            if store(gateway, raw) == 0:
                acknowledged.append(raw)
        assert len(acknowledged) >= 8
        wait_for(lambda: any(state.startswith("hung") for state in disks.states()), "the disk to be told")
        fresh = item()
        assert store(gateway, fresh) == 0
        acknowledged.append(fresh)
    finally:
        freeze(disks.paths[which], thaw=True)
    wait_for(lambda: disks.states() == ["online", "online"], "the disk to come back")
    assert gateway.status()["instances"] == len(acknowledged)
    for raw in acknowledged:
        assert store(gateway, raw) == 0  # known, and its copy is whole
    gateway.stop(9)
    gateway.start()
    assert gateway.status()["instances"] == len(acknowledged)


def test_all_disks_hang(disks: TwoDisks) -> None:
    """0xA700 within a bounded time, never silence; afterwards it goes on without a restart. What the log takes until
    then is kept."""
    gateway = disks.gateway
    first = item()
    assert store(gateway, first) == 0
    for path in disks.paths:
        freeze(path)
    try:
        tried = [item() for _ in range(3)]
        answers = [store(gateway, one) for one in tried]
        assert set(answers) <= {0, OUT_OF_RESOURCES, None}
        assert store(gateway, large()) in (OUT_OF_RESOURCES, None)
        wait_for(lambda: store(gateway, item()) == OUT_OF_RESOURCES, "an honest refusal")
    finally:
        for path in disks.paths:
            freeze(path, thaw=True)
    wait_for(lambda: store(gateway, item()) == 0, "it to store again")
    promised = {one.sop_instance for one, answer in zip(tried, answers, strict=True) if answer == 0}
    wait_for(lambda: gateway.status()["catch_up"]["missing"] == 0, "what the log has taken to be on a disk")

    def published() -> set[str]:
        return {path.stem for volume in disks.paths for path in (volume / "archive").rglob("*.dcm")}

    # The sweep moves what was in the middle of its move when the disks froze.
    wait_for(lambda: {first.sop_instance} | promised <= published(), "all of it to be in the tree", 150)


def test_the_disk_of_the_catalogue_is_full(disks: TwoDisks) -> None:
    """0xA700, reads go on, also after a restart; room again, and it stores again."""
    gateway = disks.gateway
    first = item()
    assert store(gateway, first) == 0
    spares = disks.state / "log"
    wait_for(lambda: list(spares.glob("spare-*")), "the log to have its room")
    filler = disks.state / "filler"

    def filled() -> bool:
        """The log may take room meanwhile."""
        with contextlib.suppress(OSError), filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disks.state).free - (1 << 20))
            return True
        return False

    wait_for(filled, "its disk to be full")
    wait_for(lambda: store(gateway, item()) == OUT_OF_RESOURCES, "an honest refusal")
    assert gateway.status()["instances"] >= 1
    gateway.stop()
    gateway.start()
    wait_for(lambda: store(gateway, item()) == OUT_OF_RESOURCES, "an honest refusal after a restart")
    assert gateway.status()["instances"] >= 1
    filler.unlink()
    wait_for(lambda: store(gateway, item()) == 0, "it to store again")


def test_one_failing_sync_does_not_end_a_gateway_by_itself(disks: TwoDisks) -> None:
    """A disk fails for good under load: senders are interrupted, and the other disk takes what they send again."""
    gateway = disks.gateway
    assert all(store(gateway, item()) == 0 for _ in range(4))
    disks.disks.fail(1)
    deadline = time.monotonic() + 60
    while store(gateway, item()) != 0:
        assert time.monotonic() < deadline
    assert [store(gateway, item()) for _ in range(5)] == [0] * 5


def test_a_marker_that_is_away_for_a_moment_is_no_loss(tmp_path: Path, new_gateway: Callable[..., Gateway]) -> None:
    volume = tmp_path / "second"
    create_marker(volume)
    gateway = new_gateway(TANDEM__STORAGE__VOLUMES=f'["{volume}"]')
    assert store(gateway, item()) == 0
    marker = volume / "tandem-volume.json"
    raw = marker.read_bytes()

    def state() -> str:
        return str(gateway.status()["nodes"]["standalone"]["volumes"][0]["state"])

    marker.rename(tmp_path / "marker")
    wait_for(lambda: state().startswith("offline"), "it to be noticed")
    (tmp_path / "marker").rename(marker)
    assert marker.read_bytes() == raw
    wait_for(lambda: state() == "online", "it to come back")
    assert gateway.status()["catch_up"]["missing"] == 0
    assert store(gateway, item()) == 0
