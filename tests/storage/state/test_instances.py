"""Rows of instances: what goes in comes out, whatever else is in the series; counts and names go with the last."""

from hypothesis import given, settings
from hypothesis import strategies as st

from storage.state import instances
from storage.state.catalogue import Batch, Catalogue
from storage.state.keys import ALL, OF_ALL
from storage.state.model import Delete, Entry, Put
from tests.simulation.machine import MemoryKv, Power

text = st.text(max_size=8)
some_keys = st.dictionaries(st.sampled_from([*ALL, *OF_ALL, "OfANewerVersion"]), text, max_size=8)
puts = st.builds(
    Put,
    sop_instance=st.sampled_from(["1.1", "1.2", "1.3", "1.4"]),
    sop_class=st.sampled_from(["CT", "MR"]),
    study=st.sampled_from(["2.1", "2.2"]),
    series=st.sampled_from(["3.1", "3.2"]),
    transfer_syntax=st.sampled_from(["I", "E"]),
    digest=st.binary(min_size=16, max_size=16),
    length=st.integers(0, 1 << 40),
    offset=st.integers(0, 1 << 20),
    keys=some_keys,
    calling_ae=text,
    received=st.floats(allow_nan=False),
    replaces=st.booleans(),
)
deletes = st.builds(
    Delete,
    study=st.sampled_from(["2.1", "2.2"]),
    series=st.sampled_from(["", "3.1"]),
    sop_instance=st.sampled_from(["", "1.1"]),
    reason=st.just("why"),
    by=st.just(""),
    at=st.just(0.0),
)


@given(st.lists(puts | deletes, max_size=20))
@settings(deadline=None)
def test_the_catalogue_has_what_a_dictionary_would(operations: list[Put | Delete]) -> None:
    catalogue = Catalogue(MemoryKv(Power()))
    expected: dict[str, tuple[int, Put]] = {}
    for seq, operation in enumerate(operations, 1):
        entry = Entry(1, seq, operation)
        catalogue.write(Batch(appends=[(entry, None)], applies=[(entry, None)]))
        if isinstance(operation, Put):
            expected[operation.sop_instance] = seq, operation
        else:
            expected = {uid: found for uid, found in expected.items() if not _names(operation, found[1])}
    for uid in ("1.1", "1.2", "1.3", "1.4"):
        found = catalogue.instance(uid)
        assert (None if found is None else (found.seq, found.put)) == expected.get(uid)
    for study in ("2.1", "2.2"):
        of_study = [put for _, put in expected.values() if put.study == study]
        assert catalogue.count_instances(study) == len(of_study)
        assert catalogue.sop_classes(study) == {put.sop_class for put in of_study}
        for series in ("3.1", "3.2"):
            of_series = sorted(put.sop_instance for put in of_study if put.series == series)
            assert [one.put.sop_instance for one in catalogue.instances_of(study, series)] == of_series
            assert catalogue.count_instances(study, series) == len(of_series)
    named = {(put.study, put.series) for _, put in expected.values()}
    with catalogue.kv.read() as txn:
        for table in ("number", "base", "tally"):
            assert txn.count(table) == len(named)
        assert txn.count("members") == txn.count("instances") == txn.count("kept") == len(expected)


def _names(delete: Delete, put: Put) -> bool:
    return (
        delete.study == put.study
        and (delete.sop_instance or delete.series in ("", put.series))
        and delete.sop_instance in ("", put.sop_instance)
    )


def test_a_base_stays_while_the_first_instance_goes() -> None:
    catalogue = Catalogue(MemoryKv(Power()))
    made = [
        Put(
            f"1.{number}",
            "CT",
            "2",
            "3",
            "I",
            b"d" * 16,
            1,
            1,
            {"Modality": "CT", "InstanceNumber": str(number)},
            "A",
            0,
        )
        for number in range(3)
    ]
    rows = [(Entry(1, seq, put), None) for seq, put in enumerate(made, 1)]
    catalogue.write(Batch(appends=rows, applies=rows))
    gone = Entry(1, 4, Delete("2", "3", "1.0", "", "", 0.0))
    catalogue.write(Batch(appends=[(gone, None)], applies=[(gone, None)]))
    assert [one.put for one in catalogue.instances_of("2", "3")] == made[1:]
    with catalogue.kv.read() as txn:
        assert instances.number_of(txn, "2", "3") is not None


@given(st.text(alphabet="0123456789.", max_size=70) | st.text(max_size=10))
def test_a_key_gives_back_its_uid(uid: str) -> None:
    key = instances.key_of(uid)
    assert instances.uid_of(key) == uid
    if set(uid) <= set("0123456789."):
        assert len(key) <= 1 + len(uid) // 2
