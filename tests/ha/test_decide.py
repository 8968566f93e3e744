"""The decision table: what a node does in each situation, without any of the machinery."""

from dataclasses import replace

import pytest
from msgspec.structs import replace as replaced

from ha.decide import (
    DRAIN_S,
    FLOOR_S,
    Acquire,
    Bump,
    Change,
    GiveReads,
    Leader,
    Release,
    Serve,
    ServeReads,
    State,
    StopFollowers,
    Switchover,
    TakeReads,
    View,
    check_invariants,
    decide,
)
from storage.control import NEVER, Asked, Member, Report, Tell

ME, PEER = Member("a", "store-a", 3), Member("b", "store-b", 7)
NOW = 1000.0


def report(**changes: object) -> Report:
    base: dict[str, object] = {
        "store_id": "store-a",
        "incarnation": 3,
        "cluster_id": "c",
        "promised": 5,
        "leading": 0,
        "serving": False,
        "whole": True,
        "last": (5, 10),
        "linked": False,
        "peer": None,
        "peer_last": None,
        "grant_until": NEVER,
        "granted_until": NEVER,
        "withhold": False,
        "asked": None,
    }
    return Report(**{**base, **changes})  # type: ignore[arg-type]


def state(*members: Member, epoch: int = 5, nonce: str = "n") -> State:
    return State("c", epoch, "b", members, nonce, 77)


def view(gateway: Report | None, **changes: object) -> View:
    base = View(
        node="a",
        peer="b",
        now=NOW,
        ttl_s=3.0,
        started_at=0.0,
        gateway_grace_s=5.0,
        looked=True,
        etcd_ok=True,
        state=state(ME, PEER),
        leader=None,
        leader_absent_since=NOW - 100,
        lease=42,
        lease_deadline=NOW + 2,
        gateway=gateway,
        gateway_lost_at=None,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def kinds(given: View) -> list[str]:
    actions = decide(given)
    check_invariants(given, actions)
    return [type(action).__name__ for action in actions]


MINE = Leader("a", 42, 9)
LEADING = report(leading=5, serving=True)


def test_takes_over_when_the_leader_is_gone() -> None:
    actions = decide(view(report(withhold=True)))
    assert Acquire((ME,)) in actions


def test_first_stops_promising() -> None:
    actions = decide(view(report()))
    assert Tell("follow", withhold=True) in actions
    assert "Acquire" not in kinds(view(report()))


def test_the_node_that_lacks_less_comes_first() -> None:
    """Where both may lead and one is only in sync for the log."""
    both = {"withhold": True, "linked": True, "peer_last": (5, 10)}
    just_now = {"leader_absent_since": NOW - 2, "started_at": NOW - 100}
    assert "Acquire" in kinds(view(report(**both, missing=0, peer_missing=7), **just_now))
    assert "Acquire" not in kinds(view(report(**both, missing=7, peer_missing=0), **just_now))
    assert "Acquire" in kinds(view(report(**both, missing=7, peer_missing=0), leader_absent_since=NOW - 9))


def test_waits_out_its_promise() -> None:
    assert "Acquire" not in kinds(view(report(withhold=True, granted_until=NOW + 0.1)))


@pytest.mark.parametrize(
    "unfit",
    [
        report(withhold=True, whole=False),
        report(withhold=True, store_id="another disk"),
        report(withhold=True, incarnation=2),
        report(withhold=True, promised=6),
    ],
    ids=["incomplete", "another store", "older image", "promised more than etcd knows"],
)
def test_unfit_copies_never_lead(unfit: Report) -> None:
    assert "Acquire" not in kinds(view(unfit))


def test_a_node_outside_the_in_sync_set_never_leads() -> None:
    assert "Acquire" not in kinds(view(report(withhold=True), state=state(PEER)))


def test_after_a_start_the_other_node_is_given_time() -> None:
    assert "Acquire" not in kinds(view(report(withhold=True), started_at=NOW - 1, leader_absent_since=NOW - 1))
    assert "Acquire" in kinds(view(report(withhold=True), started_at=NOW - 7, leader_absent_since=NOW - 7))


def test_alone_in_the_set_it_does_not_wait() -> None:
    fresh = view(report(withhold=True), state=state(ME), started_at=NOW - 1, leader_absent_since=NOW)
    assert "Acquire" in kinds(fresh)


def test_the_longer_log_goes_first() -> None:
    behind = report(withhold=True, linked=True, peer_last=(5, 11))
    ahead = report(withhold=True, linked=True, peer_last=(5, 9))
    assert "Acquire" not in kinds(view(behind, leader_absent_since=NOW - 1))
    assert Acquire((ME, PEER)) in decide(view(ahead, leader_absent_since=NOW))


def test_leader_serves_until_its_lease_ends() -> None:
    actions = decide(view(LEADING, leader=MINE))
    assert Serve(True, NOW + 2) in actions


def test_leader_without_lease_or_grant_falls_silent() -> None:
    assert Serve(False) in decide(view(LEADING, leader=MINE, etcd_ok=False, lease_deadline=NOW - 1))


def test_pair_goes_on_without_etcd_by_the_peers_grant() -> None:
    granted = report(leading=5, serving=True, grant_until=NOW + 1)
    assert Serve(True, NOW + 1) in decide(view(granted, leader=MINE, etcd_ok=False, lease_deadline=NOW - 1))


def test_lease_of_somebody_else_gives_nothing() -> None:
    assert Serve(False) in decide(view(LEADING, leader=Leader("a", 41, 9)))


def test_restarted_gateway_leads_only_in_a_new_epoch() -> None:
    assert Bump((Member("a", "store-a", 4), PEER)) in decide(view(report(incarnation=4), leader=MINE))


def test_told_to_lead_once_it_has_acquired() -> None:
    fresh = report(promised=4, last=(4, 10))
    tells = [action for action in decide(view(fresh, leader=MINE)) if isinstance(action, Tell)]
    assert tells == [Tell("lead", 5, ("a", "b"), NOW + 2, "n")]


def test_asked_set_is_written_once() -> None:
    asked = Asked(("a",), "5.3.1")
    wants = report(leading=5, serving=True, asked=asked)
    assert Change((ME,), "5.3.1") in decide(view(wants, leader=MINE))
    assert "Change" not in kinds(view(wants, leader=MINE, state=state(ME, nonce="5.3.1")))


def test_unknown_peer_is_not_taken_into_the_set() -> None:
    wants = report(leading=5, serving=True, asked=Asked(("a", "b"), "5.3.1"))
    assert "Change" not in kinds(view(wants, leader=MINE, state=state(ME)))


def test_dead_gateway_hands_over_after_its_grace() -> None:
    assert kinds(view(None, leader=MINE, gateway_lost_at=NOW - 1)) == []
    assert kinds(view(None, leader=MINE, gateway_lost_at=NOW - 6)) == ["Serve", "Release"]


def test_restarted_agent_looks_before_it_acts() -> None:
    assert kinds(view(LEADING, looked=False, started_at=NOW - 1)) == []


def test_new_cluster() -> None:
    assert "CreateState" in kinds(view(report(cluster_id=""), state=None))
    assert "CreateState" not in kinds(view(report(), state=None))


def test_store_of_another_cluster_takes_no_part() -> None:
    assert kinds(view(report(withhold=True, cluster_id="other"))) == ["Serve", "Tell"]


def test_incomplete_leader_gives_the_lease_back() -> None:
    assert Release("complete copy: not yet") in decide(view(report(whole=False), leader=MINE))


@pytest.mark.parametrize(
    "changes",
    [
        {"promised": 8},
        {"linked": True, "peer": PEER, "peer_promised": 8},
        {"store_id": "another"},
        {"lineage": "another"},
        {"incarnation": 1},
    ],
)
def test_a_lease_that_came_back_with_a_backup_of_etcd_is_given_back(changes: dict[str, object]) -> None:
    """The state is older than what the nodes have promised each other, or of another store: no epoch is made of it."""
    old = state(ME, PEER)
    old = replace(old, lineage="log")
    found = decide(view(report(**{"lineage": "log", **changes}), state=old, leader=MINE))
    assert any(isinstance(action, Release) for action in found)
    assert not any(isinstance(action, Bump) for action in found)


def test_invariants_are_checked() -> None:
    with pytest.raises(ValueError, match="H1"):
        check_invariants(view(report(), leader=Leader("b", 1, 1)), [Acquire((ME,))])
    with pytest.raises(ValueError, match="H3"):
        check_invariants(view(LEADING, leader=MINE), [Serve(True, NOW + 60)])
    with pytest.raises(ValueError, match="H2"):
        check_invariants(view(LEADING, leader=MINE), [Tell("lead", 5, (), NOW + 60)])


def test_without_a_disk_it_hands_over_to_a_linked_peer() -> None:
    broken = report(leading=5, serving=True, linked=True, fit=False)
    assert any(isinstance(action, Release) for action in decide(view(broken, leader=MINE)))
    alone = view(broken, leader=MINE, state=state(ME))
    assert not any(isinstance(action, Release) for action in decide(alone))


def test_incomplete_copy_leads_only_where_there_is_no_other() -> None:
    incomplete = report(withhold=True, whole=False)
    assert not any(isinstance(action, Acquire) for action in decide(view(incomplete)))
    assert Acquire((ME,)) in decide(view(incomplete, state=state(ME)))
    fresh = view(incomplete, state=state(ME), leader_absent_since=NOW - 1)
    assert not any(isinstance(action, Acquire) for action in decide(fresh))  # a disk may still be on its way


def test_two_incomplete_copies_come_up_by_themselves() -> None:
    both = {"withhold": True, "whole": False, "linked": True, "peer_whole": False, "peer": PEER}
    assert Acquire((ME, PEER)) in decide(view(report(**both, peer_last=(5, 10))))
    assert not any(isinstance(action, Acquire) for action in decide(view(report(**both, peer_last=(5, 11)))))
    better = report(**{**both, "peer_whole": True}, peer_last=(5, 10))
    assert not any(isinstance(action, Acquire) for action in decide(view(better)))


# -- what people want, and a gateway that died -------------------------------------------------------------------------

PAIR = report(leading=5, serving=True, linked=True, peer=PEER, peer_last=(5, 10))
TO_PEER = Switchover("b", NOW - 1)


def test_switchover_waits_for_requests_under_way_and_takes_no_new_ones() -> None:
    actions = decide(view(replaced(PAIR, busy=2), leader=MINE, switchover=TO_PEER))
    told = next(action for action in actions if isinstance(action, Tell))
    assert told.role == "lead"
    assert told.drain
    assert not any(isinstance(action, Release) for action in actions)


def test_what_follows_the_address_ends_before_it_goes_and_images_are_taken_meanwhile() -> None:
    given = view(PAIR, leader=MINE, switchover=TO_PEER, following=True, follow_stop_s=20.0)
    actions = decide(given)
    assert StopFollowers() in actions and Serve(True, given.lease_deadline) in actions
    assert not any(isinstance(one, Release) or (isinstance(one, Tell) and one.drain) for one in actions)
    late = replace(given, switchover=Switchover("b", NOW - 21.0))  # it won't end: requests are ended beside it
    assert any(isinstance(one, Tell) and one.drain for one in decide(late))
    too_late = replace(given, switchover=Switchover("b", NOW - 21.0 - DRAIN_S))
    for ended in (replace(given, following=False), too_late):
        assert decide(ended) == [Serve(False), Tell("follow", resign=True), Release("switchover")]


@pytest.mark.parametrize("gateway", [PAIR, None], ids=["drained", "for too long"])
def test_switchover_takes_the_site_down_before_it_resigns(gateway: Report | None) -> None:
    given = view(PAIR, leader=MINE, switchover=TO_PEER)
    if gateway is None:
        given = view(replaced(PAIR, busy=2), leader=MINE, switchover=Switchover("b", NOW - DRAIN_S - 1))
    assert decide(given) == [Serve(False), Tell("follow", resign=True), Release("switchover")]


@pytest.mark.parametrize(
    ("gateway", "members"),
    [
        (replaced(PAIR, linked=False), (ME, PEER)),
        (replaced(PAIR, peer_whole=False), (ME, PEER)),
        (PAIR, (ME,)),
    ],
    ids=["not linked", "incomplete", "not in sync"],
)
def test_no_switchover_to_a_node_that_is_not_as_good(gateway: Report, members: tuple[Member, ...]) -> None:
    assert "Release" not in kinds(view(gateway, leader=MINE, switchover=TO_PEER, state=state(*members)))


def test_the_node_that_hands_over_leaves_the_lease_to_the_other() -> None:
    free = {"leader_absent_since": NOW, "state": State("c", 5, "a", (ME, PEER), "n", 77)}
    follower = replaced(PAIR, leading=0, serving=False, withhold=True)
    assert "Acquire" not in kinds(view(follower, switchover=TO_PEER, **free))
    assert "Acquire" in kinds(view(follower, switchover=Switchover("a", NOW), **free))


def test_paused_pair_takes_over_only_by_switchover() -> None:
    ready = report(withhold=True, linked=True, peer=PEER, peer_last=(5, 10))
    assert "Acquire" not in kinds(view(ready, paused=True))
    assert "Acquire" in kinds(view(ready, paused=True, switchover=Switchover("a", NOW)))
    assert "Acquire" in kinds(view(ready, paused=True, state=State("c", 5, "a", (ME, PEER), "n", 77)))


def test_dead_gateway_hands_over_at_once() -> None:
    dead = {"leader": MINE, "gateway_dead": True, "gateway_lost_at": NOW}
    assert decide(view(None, **dead)) == [Serve(False), Release("the gateway is dead", 5)]
    assert "Release" not in kinds(view(None, **dead, state=state(ME)))
    assert "Release" not in kinds(view(None, leader=MINE, gateway_lost_at=NOW))  # only silent


def test_promise_to_the_dead_does_not_bind() -> None:
    bound = report(withhold=True, granted_until=NOW + 2)
    assert Tell("follow", withhold=True, released=5) in decide(view(bound, released=5))
    assert Tell("follow", withhold=True) in decide(view(bound, released=4))  # that was an earlier one


# -- a node in trouble, a node under maintenance -----------------------------------------------------------------------


def leads(**changes: object) -> View:
    """This node leads a whole pair."""
    gateway = report(leading=5, serving=True, linked=True, peer=PEER, peer_last=(5, 10), peer_whole=True, reads=True)
    base: dict[str, object] = {"leader": Leader("a", 9, 1), "lease": 9, "lease_deadline": NOW + 2, "reads_able_at": NOW}
    return view(gateway, **{"state": state(ME, PEER), **base, **changes})


def test_a_node_in_trouble_hands_over_to_one_that_has_none() -> None:
    trouble = {"trouble": "smbd doesn't stay up"}
    assert decide(leads(**trouble))[:3] == [
        Serve(False),
        Tell("follow", resign=True),
        Release("smbd doesn't stay up"),
    ]
    late = report(leading=5, serving=True, linked=True, peer=PEER, peer_last=(5, 9), peer_whole=True, reads=True)
    draining = decide(replace(leads(**trouble), gateway=late))
    assert any(isinstance(action, Tell) and action.role == "lead" and action.drain for action in draining)
    assert Release("smbd doesn't stay up") not in draining
    too_long = replace(leads(**trouble), gateway=late, draining_since=NOW - DRAIN_S - 1)
    assert Release("smbd doesn't stay up") in decide(too_long)
    assert Release("smbd doesn't stay up") not in decide(leads(**trouble, peer_present=False))
    assert Release("smbd doesn't stay up") not in decide(leads(**trouble, paused=True))
    assert Release("smbd doesn't stay up") not in decide(leads(**trouble, state=state(ME)))


@pytest.mark.parametrize("why", [{"trouble": "x"}, {"maintained": True}])
def test_it_leaves_a_free_lease_to_the_other_for_a_while(why: dict[str, object]) -> None:
    free = view(
        report(linked=True, peer=PEER, peer_last=(5, 10), withhold=True),
        state=state(ME, PEER),
        lease=9,
        lease_deadline=NOW + 2,
        leader_absent_since=NOW - 6.0,
    )
    assert any(isinstance(action, Acquire) for action in decide(free))
    assert not any(isinstance(action, Acquire) for action in decide(replace(free, **why)))
    late = replace(free, leader_absent_since=NOW - 13.0, **why)
    assert any(isinstance(action, Acquire) for action in decide(late)), "nobody would serve"


# -- the addresses for reading -----------------------------------------------------------------------------------------


def reads(seen: View) -> list[object]:
    wanted = replace(seen, reads_wanted=True)
    actions = decide(wanted)
    check_invariants(wanted, actions)
    return [action for action in actions if isinstance(action, TakeReads | GiveReads | ServeReads)]


def follows(**changes: object) -> View:
    gateway = report(linked=True, peer=PEER, peer_last=(5, 10), reads=True)
    base: dict[str, object] = {"leader": Leader("b", 4, 1), "lease": 9, "lease_deadline": NOW + 2, "reads_able_at": NOW}
    return view(gateway, **{"state": state(ME, PEER), **base, **changes})


OURS, THEIRS = Leader("a", 9, 3), Leader("b", 4, 3)


def test_the_standby_takes_the_reading_addresses() -> None:
    assert reads(follows()) == [ServeReads(False), TakeReads()]
    assert reads(follows(reader=THEIRS)) == [ServeReads(False)]
    assert reads(follows(reader=OURS)) == [ServeReads(True, NOW + 2)]


def test_the_primary_has_them_only_without_a_standby() -> None:
    assert reads(leads(reader=OURS)) == [ServeReads(False), GiveReads()]
    assert reads(leads(reader=OURS, up=False)) == [ServeReads(True, NOW + 2)]  # clients that write come first
    assert reads(leads(reader_absent_since=NOW - 60)) == [ServeReads(False)]
    alone = {"state": state(ME), "peer_present": False}
    assert reads(leads(**alone, reader_absent_since=NOW - 0.5)) == [ServeReads(False)]
    assert reads(leads(**alone, reader_absent_since=NOW - 1.5)) == [ServeReads(False), TakeReads()]
    assert reads(leads(**alone, reader=OURS)) == [ServeReads(True, NOW + 2)]


def test_reading_addresses_end_with_the_lease_and_with_the_ability() -> None:
    assert reads(follows(reader=OURS, lease_deadline=NOW - 0.1)) == [ServeReads(False), GiveReads()]
    assert reads(follows(reader=OURS, lease_deadline=NOW - 0.1, etcd_ok=False)) == [ServeReads(False)]
    assert reads(follows(reader=Leader("a", 8, 3))) == [ServeReads(False)]  # of the lease before
    assert reads(replace(follows(reader=OURS), gateway=None, gateway_dead=True)) == [ServeReads(False), GiveReads()]
    unable = follows(reader=OURS)
    assert unable.gateway
    unable = replace(unable, gateway=replaced(unable.gateway, reads=False))
    assert reads(replace(unable, reads_able_at=NOW - 1)) == [ServeReads(True, NOW + 2)]  # for a moment only, perhaps
    assert reads(replace(unable, reads_able_at=NOW - 3)) == [ServeReads(False), GiveReads()]
    assert reads(follows(reader=OURS, reads_able=False)) == [ServeReads(False), GiveReads()]
    assert reads(follows(reads_able=False)) == [ServeReads(False)]


def test_a_key_that_is_being_given_back_is_not_used_again() -> None:
    assert reads(follows(reader=OURS, reads_given=True)) == [ServeReads(False), GiveReads()]


def test_no_reading_addresses_no_actions() -> None:
    assert not [action for action in decide(follows()) if isinstance(action, TakeReads | GiveReads | ServeReads)]


def test_invariants_of_reading_are_checked() -> None:
    for actions in ([ServeReads(True, NOW + 1)], [ServeReads(True, NOW + 9)]):
        with pytest.raises(ValueError, match="H5"):
            check_invariants(follows(), actions)
    with pytest.raises(ValueError, match="H5"):
        check_invariants(follows(reader=OURS), [ServeReads(True, NOW + 9)])


def test_an_older_image_of_a_node_never_leads() -> None:
    """Both were down, and one of them was set back to yesterday's image: it ends before what every node had."""
    old = replace(state(ME, PEER), floor=11)
    assert "Acquire" not in kinds(view(report(withhold=True), state=old))
    assert "Bump" not in kinds(view(report(), state=old, leader=MINE))
    assert "Acquire" in kinds(view(report(withhold=True), state=replace(old, floor=10)))


def test_etcd_is_told_now_and_then_how_far_the_log_has_come() -> None:
    leading = report(leading=5, serving=True, commit=10, incarnation=3)
    told = Change((ME, PEER), "n", 10)
    assert told in decide(view(leading, state=state(ME, PEER), leader=MINE))
    assert told not in decide(view(leading, state=replace(state(ME, PEER), floor=10), leader=MINE))
    assert told not in decide(view(leading, state=state(ME, PEER), leader=MINE, floor_at=NOW - FLOOR_S / 2))
