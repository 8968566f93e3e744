"""What both nodes know to be over leaves nothing; what isn't over stays."""

from storage.state.catalogue import Batch, Catalogue
from storage.state.model import Delete, Entry, Forget, Operation, Put, Task, TaskDone, Void
from tests.simulation.machine import MemoryKv


def put(number: int) -> Put:
    return Put(f"1.9.{number}", "1.4", "1.2", "1.3", "1.5", bytes(16), 100, 60, {}, "CT", 1.0)


def test_what_is_over_leaves_nothing() -> None:
    catalogue = Catalogue(MemoryKv())
    done: list[Operation] = [
        put(1),
        put(2),
        Delete("1.2", "1.3", "1.9.1", "why", "", 0.0),
        Task("open", "kind", "AE", b"", 1.0),
        Task("ended", "kind", "AE", b"", 1.0),
        TaskDone("ended", "done"),
        Delete("1.2", "1.3", "1.9.2", "later", "", 0.0),
    ]

    def apply(operation: Operation) -> None:
        entry = Entry(1, catalogue.epochs.last[1] + 1, operation)
        catalogue.write(Batch(appends=[(entry, None)], applies=[(entry, None)]))

    for operation in done:
        apply(operation)
    assert catalogue.forgettable(6)
    assert not catalogue.forgettable(1)
    apply(Forget(6))
    assert [catalogue.entry(seq).operation for seq in (1, 3, 5, 6)] == [Void()] * 4
    assert catalogue.entry(4).operation == done[3]
    assert catalogue.entry(7).operation == done[6]
    assert catalogue.task_ids() == ["open"]
    assert catalogue.is_deleted("1.9.1")  # as long as a file of it may turn up somewhere
    assert catalogue.is_deleted("1.9.2")
    assert catalogue.meta("forgotten", 0) == 6
    assert not catalogue.forgettable(6)
    apply(Forget(7))
    assert not catalogue.forgettable(8)  # that there was something to forget is nothing to forget
    apply(TaskDone("open", "done"))
    assert catalogue.forgettable(10)
    apply(Forget(10))
    with catalogue.kv.read() as txn:
        assert (txn.count("entries"), txn.count("tombstone"), txn.count("task")) == (1, 2, 0)
