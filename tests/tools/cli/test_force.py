"""`tandem failover --force`: what it refuses, and the epoch in which it goes on."""

import msgspec
import pytest

from ha.decide import State
from ha.etcd import HttpEtcd, KeyValue
from storage.control import Member, Report
from tools.cli.cluster import UNSEEN_EPOCHS, Cluster, forced, refusal

REPORT = Report(
    "store-a", 1, "cluster", 7, 0, False, True, (7, 100), True, Member("b", "store-b", 1), (7, 100), 0, 0, False, None
)


def report(**changes: object) -> Report:
    return msgspec.structs.replace(REPORT, **changes)


def state(epoch: int) -> State:
    return State("cluster", epoch, "a", (Member("a", "store-a", 1),), "nonce", 5)


def test_the_epoch_is_above_all_that_both_nodes_promised() -> None:
    assert forced(state(7), report(peer_promised=9), "a").epoch == 10
    assert forced(None, report(promised=12), "a").epoch == 13
    assert forced(state(20), report(), "a").epoch == 21


def test_an_unheard_node_may_have_led_in_many_epochs() -> None:
    """The two logs never use the same one: etcd may have been restored from a backup, many takeovers old."""
    made = forced(state(7), report(linked=False, peer_promised=0), "a")
    assert made.epoch >= 7 + UNSEEN_EPOCHS
    assert UNSEEN_EPOCHS > 100_000
    assert [member.node for member in made.in_sync] == ["a"]


def cluster(**keys: str) -> Cluster:
    found = {key: KeyValue(key, value, 1, 1, 1) for key, value in keys.items()}
    return Cluster(HttpEtcd(("http://127.0.0.1:1",), 1.0), "/tandem/x/", found)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"peer_leads": True}, "alive and leads"),
        ({"foreign": True}, "another log"),
        ({"peer_last": (7, 101)}, "its log is longer"),
        ({"whole": False}, "its copy is complete"),
    ],
)
def test_a_living_node_that_has_more_is_not_passed_over(changes: dict[str, object], why: str) -> None:
    none = cluster()
    assert why in refusal(none, report(**changes), "a")
    assert refusal(none, report(linked=False, **changes), "a") == ""


def test_a_node_that_leads_is_not_passed_over() -> None:
    assert "tandem switchover" in refusal(cluster(leader="b"), report(), "a")
