"""The catalogue's database, beside another process that reads it."""

import subprocess
import sys
from pathlib import Path

from storage.state.kv import LmdbKv
from tests.conftest import ROOT

TABLES = ("meta", "rows")
MAP_BYTES = 16 << 20
READER = """
import sys
from pathlib import Path
from storage.state.kv import LmdbReader
reader = LmdbReader(Path(sys.argv[1]), ("meta", "rows"))
with reader.read() as txn:
    print(txn.count("rows"), flush=True)
sys.stdin.read()
"""


def count(kv: LmdbKv) -> tuple[int, int]:
    with kv.read() as txn:
        return txn.count("meta"), txn.count("rows")


def fill(kv: LmdbKv, rows: int) -> None:
    """Each row in a transaction of its own."""
    for number in range(rows):
        kv.update(lambda txn, number=number: txn.put("rows", number.to_bytes(8, "big"), b"x" * 100))


def test_taking_another_ones_place_beside_a_reader_loses_nothing(tmp_path: Path) -> None:
    """Whatever number the transactions of the old file had come to, the new one goes on from its own end."""
    for before in (3, 4, 7, 10):
        path = tmp_path / f"catalogue{before}"
        kv = LmdbKv(path, MAP_BYTES, TABLES)
        fill(kv, before)
        reading = subprocess.Popen(
            [sys.executable, "-c", READER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        try:
            assert reading.stdout is not None
            assert int(reading.stdout.readline()) == before
            for rows in (5, 6):
                other = kv.beside()
                fill(other, rows)
                other.update(lambda txn: txn.put("meta", b"format", b"6"))
                kv.become(other)
                assert count(kv) == (1, rows)
                kv.update(lambda txn: txn.put("meta", b"applied", b"1"))
                assert count(kv) == (2, rows)
        finally:
            reading.communicate(timeout=30)
        kv.close()
        again = LmdbKv(path, MAP_BYTES, TABLES)
        assert count(again) == (2, 6)
        again.close()
