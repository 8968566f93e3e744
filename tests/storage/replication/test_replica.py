"""The replication core step by step: two cores and the messages between them, without delays or disks."""

import pytest

from storage.replication import following
from storage.replication.effects import Adopt, InvariantBroken, Limits, Persist, Publish, Send, SteppedDown, Transmit
from storage.replication.epochs import Epochs
from storage.replication.messages import KNOWS_FILES, Prepare
from storage.replication.replica import Replica

BOTH, ALONE = frozenset({"a", "b"}), frozenset({"a"})


class Node:
    """A core whose disk is instant unless held."""

    def __init__(self, name: str, peer: str) -> None:
        self.core = Replica(name, peer, "c", f"store-{name}", 1, 0, Epochs(), 0, 0, limits=Limits())
        self.owed: list[int] = []
        self.entries: dict[int, int] = {}
        self.published = 0
        self.held = False
        self.other: Node | None = None

    def run(self, now: float = 0.0) -> None:
        for effect in self.core.take():
            match effect:
                case Send(message) if self.other and self.core._linked:
                    self.other.core.receive(message, now)
                    self.other.run(now)
                case Transmit(session, first, last, commit):
                    for seq in range(first, last + 1):
                        entry = Prepare(self.core.epoch, session, seq, self.entries[seq], commit, b"", 0)
                        if self.other:
                            self.other.core.receive(entry, now)
                            self.other.run(now)
                case Persist(seq, epoch):
                    self.entries[seq] = epoch
                    if effect.owed:
                        self.owed.append(seq)
                    if not self.held:
                        self.core.persisted(seq)
                case Adopt(epoch, match):
                    self.entries = {seq: kept for seq, kept in self.entries.items() if seq <= match}
                    self.core.adopted(epoch, match)
                case Publish(seq):
                    self.published = seq
                case _:
                    pass
        if self.core._out:
            self.run(now)

    def propose(self, now: float = 0.0) -> int:
        seq = self.core.propose(now)
        self.entries[seq] = self.core.epoch
        self.core.persisted(seq)
        self.run(now)
        return seq

    def tick_until(self, now: float, since: float) -> None:
        """Five times a second, as a node does that never stands still."""
        at = since
        while at < now:
            self.core.tick(at)
            at += 0.2
        self.core.tick(now)


def pair() -> tuple[Node, Node]:
    a, b = Node("a", "b"), Node("b", "a")
    a.other, b.other = b, a
    return a, b


def joined() -> tuple[Node, Node]:
    a, b = pair()
    a.core.lead(1, ALONE, 0.0)
    for node in (a, b):
        node.core.linked_up(0.0)
    for node in (a, b, a):
        node.run()
    assert a.core.in_sync.ask is not None
    a.core.answered(a.core.in_sync.ask.token)
    assert a.core.in_sync.confirmed == BOTH
    return a, b


def test_nothing_is_committed_before_the_peer_has_it() -> None:
    a, b = joined()
    b.held = True
    seq = a.propose()
    assert a.published < seq
    b.core.persisted(seq)
    b.run()
    a.run()
    assert a.published == seq


def test_only_what_was_committed_without_it_may_come_without_its_bytes() -> None:
    a, b = pair()
    a.core.lead(1, ALONE, 0.0)
    for _ in range(3):
        a.propose()
    for node in (a, b):
        node.core.linked_up(0.0)
    b.held = True
    for node in (a, b, a):
        node.run()
    assert b.owed == [1, 2, 3]
    assert a.core.peer_lacks == 3
    b.core.persisted(3)
    b.run()
    a.run()
    assert a.core.in_sync.ask is not None
    a.core.answered(a.core.in_sync.ask.token)
    a.propose()
    assert b.owed == [1, 2, 3]
    b.core.missing, b.core.counted = 1, 3
    b.core.tick(0.3)
    b.run(0.3)
    assert a.core.peer_lacks == 1


def test_lost_peer_holds_commits_until_etcd_agreed() -> None:
    a, b = joined()
    b.core.unlinked(1.0)
    a.core.unlinked(1.0)
    seq = a.propose(1.0)
    a.tick_until(2.0, 1.0)
    assert a.core.in_sync.ask is None
    a.tick_until(3.0, 2.0)
    a.run(3.0)
    assert a.core.in_sync.ask is not None
    assert a.published < seq
    a.core.answered(a.core.in_sync.ask.token)
    a.run(3.0)
    assert a.published == seq


@pytest.mark.parametrize("linked", [True, False])
def test_a_node_that_stood_still_gives_its_peer_the_whole_time(linked: bool) -> None:
    a, _ = joined()
    a.other = None
    a.propose(1.0)
    if not linked:
        a.core.unlinked(1.0)
    a.core.tick(1.0)
    for now in (31.0, 31.2, 32.0):
        a.core.tick(now)
        a.run(now)
        assert a.core.in_sync.ask is None
    a.tick_until(34.0, 32.0)
    assert a.core.in_sync.ask is not None


def test_answer_to_an_older_question_changes_nothing() -> None:
    a, b = joined()
    for node in (a, b):
        node.core.unlinked(1.0)
    a.tick_until(3.0, 1.0)
    assert a.core.in_sync.ask is not None
    a.core.answered(a.core.in_sync.ask.token - 1)
    assert a.core.in_sync.required == BOTH


def test_diverged_tail_is_cut_when_following() -> None:
    a, b = joined()
    for node in (a, b):
        node.core.unlinked(1.0)
    a.propose(1.0)
    b.core.lead(2, frozenset({"b"}), 10.0)
    b.propose(10.0)
    for node in (b, a):
        node.core.linked_up(11.0)
    for node in (b, a, b, a):
        node.run(11.0)
    assert not a.core.leading
    assert a.entries == b.entries == {1: 2}


def test_leader_steps_down_when_denied() -> None:
    a, b = joined()
    b.core.promise(5)
    a.core.linked_up(0.0)
    effects = a.core.take()
    for effect in effects:
        if isinstance(effect, Send):
            b.core.receive(effect.message, 0.0)
    for effect in b.core.take():
        if isinstance(effect, Send):
            a.core.receive(effect.message, 0.0)
    assert not a.core.leading
    assert any(isinstance(effect, SteppedDown) for effect in a.core.take())


def test_follower_does_not_lead_while_its_promise_runs() -> None:
    a, b = joined()
    a.core.tick(1.0)
    a.run(1.0)
    assert b.core.grants.given_until > 1.0
    with pytest.raises(InvariantBroken, match="promise"):
        b.core.lead(2, BOTH, 1.0)
    assert a.core.grants.had_until < b.core.grants.given_until


@pytest.mark.parametrize("epoch", [0, 1])
def test_old_epochs_are_not_led(epoch: int) -> None:
    a, _ = joined()
    with pytest.raises(InvariantBroken):
        a.core.lead(epoch, BOTH, 0.0)


def test_follower_that_can_not_keep_an_entry_leaves_the_set() -> None:
    """It links again and again, and each time fails at the same entry: commits must not wait for ever."""
    a, b = joined()
    b.held = True
    a.propose(1.0)
    now = 1.0
    while a.core.in_sync.ask is None and now < 30.0:
        now += 0.2
        b.core.abandon()
        for node in (a, b):
            node.core.unlinked(now)
            node.core.linked_up(now)
        for node in (a, b, a):
            node.run(now)
        a.core.tick(now)
        a.run(now)
    assert a.core.in_sync.ask is not None
    assert a.core.in_sync.ask.members == ALONE
    assert now > a.core.limits.ack_timeout_s
    a.core.answered(a.core.in_sync.ask.token)
    a.run(now)
    assert a.published == 1
    assert a.core.in_sync.required == ALONE


def test_peer_without_a_disk_leaves_the_set() -> None:
    a, _ = joined()
    a.core.peer_unfit = True
    a.core.tick(0.5)
    assert a.core.in_sync.ask is not None
    assert a.core.in_sync.ask.members == ALONE


def test_a_node_that_would_not_understand_the_log_is_not_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "FEATURES", KNOWS_FILES - 1)  # both are of that version, and the log says more
    a, b = pair()
    a.core.need(KNOWS_FILES)
    a.core.lead(1, ALONE, 0.0)
    for node in (a, b):
        node.core.linked_up(0.0)
    for node in (a, b, a):
        node.run()
    assert a.core.peer_hello is not None
    assert not b.core.joined
    a.propose()
    assert (a.published, b.core.accepted) == (1, 0)


def test_a_leader_that_has_stopped_is_not_held_to_lead() -> None:
    """Or nobody could be made primary by force: one node's log is longer, and that one is told that the other leads."""
    a, b = joined()
    assert b.core.peer_hello is not None and b.core.peer_hello.leading
    a.core.follow()  # etcd is lost: its lease runs out, and it doesn't resign
    a.core.tick(1.0)
    a.run(1.0)
    assert not b.core.peer_hello.leading
