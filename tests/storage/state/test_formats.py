"""A catalogue of an older version says the same after it was brought up to date, however often that was broken off."""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from storage.state import formats, indexes, rows
from storage.state.catalogue import FORMAT, MADE_BY, Batch, Catalogue
from storage.state.entries import seq_key
from storage.state.formats import bring_up_to_date
from storage.state.kv import CatalogueDamaged, Transaction
from storage.state.model import Delete, Entry, Instance, Location, Put, Void, encode

APPLIED, LOGGED = 120, 130


def put(number: int, rng: random.Random) -> Put:
    study, series = f"1.2.{number % 5}", f"1.2.{number % 5}.{number % 3}"
    keys = {
        "PatientID": f"P{number % 5}",
        "PatientName": rng.choice(["Doe^Jane", "Doe^Jane^"]),
        "StudyInstanceUID": study,
        "SeriesInstanceUID": series,
        "InstanceNumber": str(number),
        "Modality": "CT",
    }
    if rng.random() < 0.3:
        del keys["Modality"]
    syntax, sender = rng.choice(["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"]), rng.choice(["CT1", "CT2"])
    digest = rng.randbytes(16)
    return Put(f"1.9.{number}", "1.4.5", study, series, syntax, digest, 100 + number, 60, keys, sender, 1e9 + number)


def history() -> tuple[list[tuple[Entry, Location | None]], Delete]:
    rng = random.Random(5)
    entries: list[tuple[Entry, Location | None]] = []
    for seq in range(1, LOGGED + 1):
        name = f"1.9.{seq}" if seq % 3 else f"other-{seq}"
        place = Location("volume", f"spool-{seq}", f"P/S/{name}.dcm" if seq % 7 else "")
        entries.append((Entry(1 + (seq > 40), seq, put(seq, rng)), place))
    gone = Delete("1.2.3", "", "", "a test", "nobody", 0.0)
    entries[99] = (Entry(2, 100, gone), None)
    entries[124] = (Entry(2, 125, Void()), None)  # sent so by a leader that has it no more
    return entries, gone


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Catalogue]:
    """Made by this version."""
    made = Catalogue.open(tmp_path / "fresh", 1 << 26)
    entries, _ = history()
    made.write(Batch(appends=entries, meta={**MADE_BY, "lineage": "it"}))
    made.write(Batch(applies=entries[:APPLIED]))
    yield made
    made.close()


def as_format_2(path: Path) -> Catalogue:
    """As the version before wrote it: every entry in the log, instances that are gone as Void, whole rows."""
    made = Catalogue.open(path, 1 << 26)
    entries, gone = history()
    made.write(Batch(meta={"format": 2, "lineage": "it"}))

    def write(txn: rows.Transaction) -> None:
        total = 0
        for entry, place in entries:
            txn.put("log", seq_key(entry.seq), encode(entry))
            if place:
                txn.put("location", seq_key(entry.seq), encode(place))
        txn.put("meta", b"epochs", encode(((1, 40), (2, LOGGED))))
        for entry, _ in entries[:APPLIED]:
            one = entry.operation
            if not isinstance(one, Put) or (one.study == gone.study and entry.seq < 100):
                if isinstance(one, Put):
                    txn.put("log", seq_key(entry.seq), encode(Entry(entry.epoch, entry.seq, Void())))
                    txn.delete("location", seq_key(entry.seq))
                continue
            txn.put("instance", one.sop_instance.encode(), encode(Instance(entry.seq, one)))
            txn.put("member", f"{one.study}\0{one.series}\0{one.sop_instance}".encode(), b"")
            rows.join(txn, one)
            total += one.length
        txn.put("meta", b"applied", encode(APPLIED))
        txn.put("meta", b"bytes", encode(total))

    made.kv.update(write)
    made.close()
    return Catalogue.open(path, 1 << 26)


def as_format_4(path: Path) -> Catalogue:
    """As the version before wrote it: where copies lie with volume and folder in each row."""
    made = Catalogue.open(path, 1 << 26)
    entries, _ = history()
    made.write(Batch(appends=entries, meta={"format": 4, "lineage": "it"}))
    made.write(Batch(applies=entries[:APPLIED]))

    def write(txn: rows.Transaction) -> None:
        for seq, place in located:
            own = seq <= APPLIED and place.path.endswith(f"/1.9.{seq}.dcm")
            path = place.path.removesuffix(f"1.9.{seq}.dcm") if own else place.path
            txn.put("location", seq_key(seq), encode((place.volume, place.spool, path)))
        for table in ("placed", "words"):
            for key in [key for key, _ in txn.scan(table)]:
                txn.delete(table, key)

    located = list(made.locations())
    made.kv.update(write)
    made.close()
    return Catalogue.open(path, 1 << 26)


def said(catalogue: Catalogue) -> dict[str, object]:
    """All that a catalogue answers with."""
    found: dict[str, object] = {"entries": catalogue.entries(1, 1000), "counts": catalogue.counts()}
    found |= {"copies": catalogue.copies_on(), "locations": list(catalogue.locations())}
    found["placed"] = catalogue.locations_on("volume", 0, 1000)
    for study, row in catalogue.studies():
        found[study] = row, catalogue.count_instances(study), catalogue.sop_classes(study)
        for series, one in catalogue.series_of(study):
            found[series] = one, list(catalogue.instances_of(study, series)), catalogue.count_instances(study, series)
    for seq in range(1, LOGGED + 1):
        found[f"entry {seq}"] = catalogue.entry(seq)
    return found


@pytest.mark.parametrize("made", [as_format_2, as_format_4])
def test_it_says_the_same(tmp_path: Path, fresh: Catalogue, made: Callable[[Path], Catalogue]) -> None:
    old = made(tmp_path / "old")
    bring_up_to_date(old, "")
    assert said(old) == said(fresh)
    assert (old.meta("format", 0), old.meta("converting", 0)) == (FORMAT, 0)
    with old.kv.read() as txn:
        assert txn.count("member") == txn.count("instance") == 0
        assert txn.count("entries") == 1 + LOGGED - APPLIED  # the deletion, and what isn't applied
        assert txn.count("log") == 1
    old.close()


def test_a_word_that_is_missing_is_damage(tmp_path: Path, fresh: Catalogue) -> None:
    fresh.kv.update(lambda txn: txn.delete("words", b"n" + (2).to_bytes(4, "big")))
    with pytest.raises(CatalogueDamaged, match="missing"):
        list(fresh.locations())


def test_copies_that_no_volume_counts_are_damage(fresh: Catalogue) -> None:
    key = fresh.kv.read()
    with key as txn:
        one = next(txn.scan("placed"))[0]
    fresh.kv.update(lambda txn: txn.delete("placed", one))
    with pytest.raises(CatalogueDamaged, match="on a volume"):
        Catalogue(fresh.kv)


@pytest.mark.parametrize("steps", range(1, 12, 2))
def test_it_goes_on_where_it_was_broken_off(
    tmp_path: Path, fresh: Catalogue, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(formats, "ROWS_AT_ONCE", 20)
    old = as_format_2(tmp_path / "old")
    left = [steps]
    taken = islice

    def stopping(rows: Iterator[tuple[bytes, bytes]], count: int) -> Iterator[tuple[bytes, bytes]]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return taken(rows, count)

    with monkeypatch.context() as patched:
        patched.setattr(formats, "islice", stopping)
        with pytest.raises(KeyboardInterrupt):
            bring_up_to_date(old, "")
    old.close()
    again = Catalogue.open(tmp_path / "old", 1 << 26)
    bring_up_to_date(again, "")
    assert said(again) == said(fresh)
    again.close()


def test_indexes_of_other_rules_are_made_anew(fresh: Catalogue) -> None:
    """Another version, or another Python, folds otherwise: what they find would be too little."""

    def rows_of(table: str) -> list[tuple[bytes, bytes]]:
        with fresh.kv.read() as txn:
            return list(txn.scan(table))

    def spoiled(txn: Transaction) -> None:
        for key, _ in list(txn.scan("index")):
            txn.delete("index", key)

    before = {table: rows_of(table) for table in indexes.TABLES}
    fresh.kv.update(spoiled)
    bring_up_to_date(fresh, "")
    assert rows_of("index") == []  # it was made by these rules
    fresh.write(Batch(meta={"index_rules": "0, Unicode 1.0"}))
    bring_up_to_date(fresh, "")
    assert {table: len(rows_of(table)) for table in indexes.TABLES} == {table: len(before[table]) for table in before}
    assert fresh.meta("index_rules", "") == indexes.RULES
