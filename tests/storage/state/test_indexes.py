"""The indexes say what the rows say, after whatever has happened to them, and find all that matches."""

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from storage.state import indexes, rows
from storage.state.catalogue import Batch, Catalogue
from storage.state.indexes import NO_DATE, NO_MOMENT, NUMBER_BYTES, Kind, Range, beginning, days, exactly
from storage.state.kv import Transaction
from storage.state.model import Delete, Entry, Put
from tests.simulation.machine import MemoryKv

NAMES = ("Doe^Jane", "DOE^JANE^", "Müller^Jörg", "Wang^XiaoDong=王^小东=", "Yamada^Tarou=山田^太郎=やまだ^たろう", "")
keys = st.fixed_dictionaries(
    {"PatientID": st.sampled_from(["P1", "P10", "p1", ""])},
    optional={
        "PatientName": st.sampled_from(NAMES),
        "IssuerOfPatientID": st.sampled_from(["A", "B"]),
        "StudyDate": st.sampled_from(["20260101", "20260102", "2026.01.03", "2026", "20260101\\20260102", "x", " "]),
        "StudyTime": st.sampled_from(["", "1030", "103000.5", "09:15", "x"]),
        "AccessionNumber": st.sampled_from(["A1", "A1\\A2", "A\0", "a1"]),
        "StudyDescription": st.sampled_from(["Thorax nativ", "THORAX", "x" * 300]),
        "ReferringPhysicianName": st.sampled_from(NAMES),
        "Modality": st.sampled_from(["CT", "MR", "CT\\SR", " ", "", "x" + "é" * 120, "X" * 40]),
    },
)
instances = st.tuples(st.sampled_from("abcdef"), st.sampled_from(["1.2.1", "1.2.2"]), st.sampled_from("12"), keys)
deletions = st.tuples(st.sampled_from(["1.2.1", "1.2.2"]), st.sampled_from(["", "1", "2"]), st.sampled_from("abcdef"))


def put(uid: str, study: str, series: str, found: dict[str, str]) -> Put:
    return Put(f"1.9.{ord(uid)}", "1.4", study, f"{study}.{series}", "1.5", bytes(16), 100, 60, found, "CT1", 1.0)


def catalogue_of(done: Iterable[tuple]) -> Catalogue:
    made = Catalogue(MemoryKv())
    for seq, one in enumerate(done, 1):
        if len(one) == 4:
            operation = put(*one)
        else:
            study, series, uid = one
            operation = Delete(study, series and f"{study}.{series}", f"1.9.{ord(uid)}" if series else "", "", "", 0.0)
        entry = (Entry(1, seq, operation), None)
        made.write(Batch(appends=[entry]))
        made.write(Batch(applies=[entry]))
    return made


def said(txn: Transaction) -> dict[str, object]:
    """All that the indexes say, by UID."""
    uids = {number: uid.decode() for number, uid in txn.scan("numbered")}
    assert {uid: number for number, uid in uids.items()} == {
        uid: number for uid in uids.values() if (number := indexes.number_of(txn, uid))
    }
    assert txn.count("study_number") == len(uids) == txn.count("study")
    found: dict[str, object] = {
        table: {(key[:-NUMBER_BYTES], uids[key[-NUMBER_BYTES:]], value) for key, value in txn.scan(table)}
        for table in ("index", "days", "modalities")
    }
    texts: dict[str, bytes] = {}
    for key, raw in txn.scan("texts"):
        for one in raw.split(b"\0")[1:]:
            number = int.from_bytes(key, "big") * indexes.AT_ONCE + one[0] - 2
            texts[uids[number.to_bytes(NUMBER_BYTES, "big")]] = one[1:]
    return {**found, "texts": texts}


@given(st.lists(instances | instances | deletions, max_size=20))
@settings(deadline=None)
def test_they_are_those_of_the_rows(done: list[tuple]) -> None:
    catalogue = catalogue_of(done)
    with catalogue.kv.read() as txn:
        kept = said(txn)
    rows.index_anew(catalogue.kv)
    with catalogue.kv.read() as txn:
        assert said(txn) == kept


def found(catalogue: Catalogue, *asked: Range) -> list[str]:
    return [uid for one in asked for uid, _ in catalogue.numbered(catalogue.numbers(one))]


def with_part(catalogue: Catalogue, part: str) -> list[str]:
    return [uid for uid, _ in catalogue.numbered(catalogue.with_part(part.encode()))]


def test_ranges_find_what_they_name_newest_first() -> None:
    days_of = [("20260101", "10", "CT"), ("20260101", "09", "MR"), ("20260102", "", "CT")]
    done = []
    for number, (day, hour, modality) in enumerate([*days_of, ("2026", "", "CT"), ("", "", "MR")]):
        said = {"PatientID": f"P{number}", "StudyDate": day, "StudyTime": hour, "Modality": modality}
        done.append((chr(97 + number), f"1.2.{number}", "1", said))
    catalogue = catalogue_of(done)
    assert found(catalogue, *days("20260101", "20260101")) == ["1.2.0", "1.2.1", "1.2.3"]
    assert found(catalogue, *days("20260101", "20260101", "CT")) == ["1.2.0", "1.2.3"]
    assert found(catalogue, *days("", "20260101")) == ["1.2.0", "1.2.1", "1.2.3"]
    assert found(catalogue, *days("", "")) == ["1.2.2", "1.2.0", "1.2.1", "1.2.3", "1.2.4"]
    assert found(catalogue, *days("20260102", "")) == ["1.2.2", "1.2.3"]
    assert found(catalogue, exactly(Kind.PATIENT_ID, "P1")) == ["1.2.1"]
    assert found(catalogue, exactly(Kind.PATIENT_ID, "P")) == []
    assert len(found(catalogue, beginning(Kind.PATIENT_ID, "P"))) == 5
    assert sorted(catalogue.modalities()) == ["CT", "MR"]
    assert NO_DATE < NO_MOMENT < b"00010101000000"


def test_more_than_a_page_of_each() -> None:
    many = 1200
    catalogue = Catalogue(MemoryKv())
    entries = []
    for seq in range(1, many + 1):
        keys = {"PatientID": f"P{seq:04}", "StudyDate": "20260101", "PatientName": f"Name{seq:04}^X"}
        one = Put(f"1.9.{seq}", "1.4", f"1.2.{seq}", f"1.3.{seq}", "1.5", bytes(16), 1, 1, keys, "A", 1.0)
        entries.append((Entry(1, seq, one), None))
    catalogue.write(Batch(appends=entries))
    catalogue.write(Batch(applies=entries))
    everything = {f"1.2.{seq}" for seq in range(1, many + 1)}
    for asked in (*days("20260101", "20260101")[:1], beginning(Kind.PATIENT_ID, "P"), beginning(Kind.NAME, "name")):
        once = found(catalogue, asked)
        assert len(once) == many
        assert set(once) == everything
    assert set(with_part(catalogue, "ame")) == everything
    assert with_part(catalogue, "ame0777") == ["1.2.777"]
    assert with_part(catalogue, "p0777") == ["1.2.777"]
    assert with_part(catalogue, "ame0777^xp") == []
    catalogue.write(Batch(appends=[(Entry(1, many + 1, Delete("1.2.777", "", "", "", "", 0.0)), None)]))
    catalogue.write(Batch(applies=[(Entry(1, many + 1, Delete("1.2.777", "", "", "", "", 0.0)), None)]))
    assert with_part(catalogue, "ame0777") == []
    assert len(with_part(catalogue, "ame077")) == 9


def test_a_study_keeps_its_number_as_long_as_it_is_there() -> None:
    """Whoever goes through studies neither misses it nor meets it twice when an instance of it goes."""
    keys = {"PatientID": "P1", "StudyDate": "20260101"}
    catalogue = catalogue_of([("a", "1.2.1", "1", keys), ("b", "1.2.1", "1", {**keys, "PatientName": "Doe"})])
    with catalogue.kv.read() as txn:
        before = indexes.number_of(txn, "1.2.1")
    gone = (Entry(1, 3, Delete("1.2.1", "1.2.1.1", "1.9.97", "", "", 0.0)), None)
    catalogue.write(Batch(appends=[gone]))
    catalogue.write(Batch(applies=[gone]))
    with catalogue.kv.read() as txn:
        assert indexes.number_of(txn, "1.2.1") == before
    assert with_part(catalogue, "doe") == ["1.2.1"]
