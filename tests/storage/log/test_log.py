"""The contract of the log, on a real folder and on a disk that forgets, tears and reorders what wasn't synced."""

import errno
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.log.folder import Folder, LocalFolder, LogDamaged
from storage.log.log import Broken, Log
from storage.log.records import Record
from tests.conftest import FUZZ
from tests.storage.log.folders import MemoryFolder

SEGMENT_BYTES = 16 << 10
SEEDS = 300 * FUZZ


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return LocalFolder(tmp_path / "log") if request.param == "local" else MemoryFolder(random.Random(1))


def opened(folder: Folder) -> Log:
    return Log(folder, SEGMENT_BYTES)


def made(folder: Folder) -> Log:
    log = opened(folder)
    log.begin("lineage")
    return log


def entries(start: int, count: int, epoch: int = 1, size: int = 700) -> list[Record]:
    return [Record(epoch, seq, bytes([seq % 251]) * (size + seq % 13)) for seq in range(start, start + count)]


def test_what_is_appended_is_there_again(folder: Folder) -> None:
    log = made(folder)
    assert (log.lineage, log.first, log.last, log.epochs) == ("lineage", 1, (0, 0), ())
    log.append(entries(1, 10))
    log.append(entries(11, 50, 2))
    for one in (log, opened(folder)):
        assert (one.lineage, one.first, one.last) == ("lineage", 1, (2, 60))
        assert one.epochs == ((1, 10), (2, 60))
        assert list(one.records(1)) == entries(1, 10) + entries(11, 50, 2)
        with pytest.raises(KeyError):
            one.read(61)
        with pytest.raises(KeyError):
            one.read(0)


def test_an_empty_folder_is_no_log(folder: Folder) -> None:
    log = opened(folder)
    assert (log.lineage, log.last, log.first) == ("", (0, 0), 1)
    with pytest.raises(ValueError, match="begun"):
        log.append(entries(1, 1))


@pytest.mark.parametrize(
    "record", [Record(1, 3, b""), Record(1, 1, b""), Record(0, 2, b""), Record(1, 2, bytes(SEGMENT_BYTES))]
)
def test_what_does_not_follow_is_refused(folder: Folder, record: Record) -> None:
    log = made(folder)
    log.append(entries(1, 1))
    with pytest.raises(ValueError, match=r"follow|longer"):
        log.append([record])
    log.append(entries(2, 1))
    assert opened(folder).last == (1, 2)


def test_many_entries_share_one_sync() -> None:
    folder = MemoryFolder(random.Random(1))
    log = made(folder)
    log.prepare()
    before = folder.syncs
    log.append(entries(1, 10))
    assert folder.syncs == before + 1
    for number in range(11, 15):
        log.append(entries(number, 1))
    assert folder.syncs == before + 5


def test_what_was_cut_off_stays_so(folder: Folder) -> None:
    log = made(folder)
    log.append(entries(1, 30))
    log.cut(12)
    assert log.last == (1, 12)
    with pytest.raises(KeyError):
        log.read(13)
    assert opened(folder).last == (1, 12)
    log.append(entries(13, 40, 2, size=300))
    log.cut(20)
    log.cut(20)
    log.append(entries(21, 3, 5))
    expected = entries(1, 12) + entries(13, 8, 2, size=300) + entries(21, 3, 5)
    for one in (log, opened(folder)):
        assert list(one.records(1)) == expected
        assert one.epochs == ((1, 12), (2, 20), (5, 23))


def test_what_is_cut_off_before_the_beginning_begins_the_log_anew(folder: Folder) -> None:
    """The entries behind which it began weren't committed."""
    log = opened(folder)
    log.begin("lineage", ((1, 6), (2, 9)))
    log.append(entries(10, 2, 2))
    log.cut(7)
    for one in (log, opened(folder)):
        assert (one.lineage, one.first, one.last, one.epochs) == ("lineage", 8, (2, 7), ((1, 6), (2, 7)))
    log.append(entries(8, 3, 3))
    assert opened(folder).last == (3, 10)


def test_cut_to_nothing(folder: Folder) -> None:
    log = made(folder)
    log.append(entries(1, 3))
    log.cut(0)
    assert (log.last, log.epochs) == ((0, 0), ())
    log.append(entries(1, 1, 7))
    assert opened(folder).last == (7, 1)


def test_trimming_keeps_what_is_asked_for_and_uses_files_again(folder: Folder) -> None:
    log = made(folder)
    for start in range(1, 400, 20):
        log.append(entries(start, 20))
        log.trim(start - 30)
        assert log.first <= max(1, start - 29)
    assert log.bytes_kept <= 8 * SEGMENT_BYTES
    assert log.first > 300
    again = opened(folder)
    assert (again.first, again.last) == (log.first, log.last)
    assert list(again.records(again.first)) == entries(again.first, 401 - again.first)
    with pytest.raises(KeyError):
        again.read(again.first - 1)
    assert log.trim(10**9) > 0
    assert log.last == (1, 400)


def test_a_log_is_begun_anew_behind_a_state_that_was_taken_over(folder: Folder) -> None:
    log = made(folder)
    log.append(entries(1, 60))
    log.begin("other", ((3, 500), (4, 1000)))
    assert (log.lineage, log.first, log.last) == ("other", 1001, (4, 1000))
    log.append(entries(1001, 30, 4))
    for one in (log, opened(folder)):
        assert (one.lineage, one.first, one.last) == ("other", 1001, (4, 1030))
        assert list(one.records(1001)) == entries(1001, 30, 4)


def test_a_full_disk_is_noticed_before_anything_is_written() -> None:
    folder = MemoryFolder(random.Random(1), room=3 * SEGMENT_BYTES)
    log = Log(folder, SEGMENT_BYTES, spares=0)
    log.begin("lineage")
    number = 1
    with pytest.raises(OSError, match="No space") as raised:
        while True:
            log.append(entries(number, 7))
            number += 7
    assert raised.value.errno == errno.ENOSPC
    assert log.last == (1, number - 1)
    assert opened(folder).last == (1, number - 1)
    log.trim(number - 1)
    log.append(entries(number, 7))
    assert log.last == (1, number + 6)


def test_nothing_is_appended_after_a_write_has_failed() -> None:
    folder = MemoryFolder(random.Random(1))
    log = made(folder)
    log.append(entries(1, 3))
    folder.steps_left = 1
    with pytest.raises(OSError, match="Input/output"):
        log.append(entries(4, 1))
    folder.steps_left = None
    with pytest.raises(Broken):
        log.append(entries(4, 1))
    assert log.last == (1, 3)


def test_damage_that_is_not_at_the_tail_is_told(tmp_path: Path) -> None:
    log = made(LocalFolder(tmp_path))
    log.append(entries(1, 100))
    first = sorted(tmp_path.glob("*.log"))[0]
    raw = bytearray(first.read_bytes())
    raw[6000] ^= 1
    first.write_bytes(raw)
    again = opened(LocalFolder(tmp_path))
    assert again.last == (1, 100)
    with pytest.raises(LogDamaged):
        list(again.records(1))
    assert again.read(100) == entries(100, 1)[0]


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_damaged_head_is_told(tmp_path: Path, which: int) -> None:
    """It isn't taken for a segment that was never begun, whose file may be used again."""
    log = made(LocalFolder(tmp_path))
    log.append(entries(1, 100))
    file = sorted(tmp_path.glob("*.log"))[which]
    raw = bytearray(file.read_bytes())
    raw[20] ^= 1
    file.write_bytes(raw)
    with pytest.raises(LogDamaged):
        opened(LocalFolder(tmp_path))
    assert file.read_bytes() == raw


def test_what_is_found_after_a_kill_is_synced_before_it_counts() -> None:
    folder = MemoryFolder(random.Random(1))
    log = made(folder)
    log.append(entries(1, 1))
    folder.steps_left = 1  # the write is done, the sync isn't
    with pytest.raises(OSError, match="Input/output"):
        log.append(entries(2, 1))
    folder.steps_left = None
    again = opened(folder)
    last = again.last
    folder.cut_power()
    assert opened(folder).last == last


def test_readers_beside_the_writer(tmp_path: Path) -> None:
    log = made(LocalFolder(tmp_path))
    found: list[str] = []
    stop = threading.Event()

    def read() -> None:
        rng = random.Random(2)
        while not stop.is_set():
            seq = rng.randint(1, 3000)
            try:
                record = log.read(seq)
            except KeyError:
                continue
            except Exception as error:
                found.append(repr(error))
                return
            if record != entries(seq, 1)[0]:
                found.append(f"{seq} is another")
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for start in range(1, 3000, 10):
        log.append(entries(start, 10))
        log.trim(start - 200)
    stop.set()
    for reader in readers:
        reader.join()
    assert found == []


# -- power cuts --------------------------------------------------------------------------------------------------------


class Model:
    """Drives a log through appends, cuts, trims, failing disks and power cuts, and knows what must be there."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.folder = MemoryFolder(self.rng)
        self.log = opened(self.folder)
        self.log.begin("lineage")
        self.kept: list[Record] = []  # durable for certain, from entry 1 on
        self.perhaps: list[list[Record]] = []  # what may be there instead after an operation that didn't end
        self.lost: list[Record] = []  # of the last append that didn't end; their sender may send them again
        self.trimmed = 0
        self.epoch = 1

    def run(self, steps: int) -> None:
        operations: list[Callable[[], None]] = [self.append] * 6 + [self.cut, self.trim, self.prepare, self.restart]
        for _ in range(steps):
            if self.rng.random() < 0.15:
                self.folder.steps_left = self.rng.randint(0, 6)
            try:
                self.rng.choice(operations)()
            except (OSError, Broken):
                self.restart()
                if self.rng.random() < 0.5:
                    self.again()
            self.check()

    def append(self) -> None:
        self.epoch += self.rng.random() < 0.2
        seq = len(self.kept) + 1
        sizes = [self.rng.choice((4, 20, 600, 3000)) for _ in range(self.rng.randint(1, 8))]
        records = [Record(self.epoch, seq + number, self.rng.randbytes(size)) for number, size in enumerate(sizes)]
        self._append(records)

    def again(self) -> None:
        """A part of what didn't end is sent again, or others of the same length in its place; then the power goes."""
        if not self.lost or self.lost[0].seq != len(self.kept) + 1:
            return
        records = self.lost[: self.rng.randint(1, len(self.lost))]
        if self.lost[0].epoch != self.epoch or self.rng.random() < 0.3:
            self.epoch += 1
            records = [Record(self.epoch, one.seq, bytes(len(one.payload))) for one in records]
        self._append(records)
        self.restart()

    def _append(self, records: list[Record]) -> None:
        self.lost = records
        self.perhaps = [self.kept + records[:count] for count in range(1, len(records) + 1)]
        self.log.append(records)
        self.kept, self.perhaps, self.lost = self.kept + records, [], []

    def cut(self) -> None:
        after = self.rng.randint(max(self.trimmed, len(self.kept) - 12), len(self.kept)) if self.kept else 0
        self.perhaps = [self.kept[:after]]
        self.log.cut(after)
        self.kept, self.perhaps = self.kept[:after], []
        self.epoch += 1  # whoever leads now does so in another epoch

    def trim(self) -> None:
        upto = self.rng.randint(0, len(self.kept))
        self.trimmed = max(self.trimmed, upto)
        self.log.trim(upto)

    def prepare(self) -> None:
        self.log.prepare()

    def restart(self) -> None:
        self.folder.cut_power()
        self.log = opened(self.folder)
        allowed = [self.kept, *self.perhaps]
        found = next((one for one in allowed if self._is(one)), None)
        assert found is not None, f"{self.log.last} after a power cut, not {[len(one) for one in allowed]}"
        self.kept, self.perhaps = found, []
        self.epoch += self.rng.random() < 0.5

    def _is(self, records: list[Record]) -> bool:
        last = (records[-1].epoch, records[-1].seq) if records else (0, 0)
        return self.log.last == last and list(self.log.records(self.log.first)) == records[self.log.first - 1 :]

    def check(self) -> None:
        assert self.log.first <= self.trimmed + 1
        assert list(self.log.records(self.log.first)) == self.kept[self.log.first - 1 :]


@given(st.integers(0, 2**32))
def test_what_was_appended_survives_any_power_cut(seed: int) -> None:
    Model(seed).run(40)


def test_many_seeds() -> None:
    for seed in range(SEEDS):
        Model(seed).run(60)
