"""The HA decision: what this node should do next, from what it sees. Pure: `decide(view) -> actions`.

Times are seconds of this node's CLOCK_BOOTTIME. The agent carries the actions out in order, looks again, and asks
again; every answer is right on its own, so a lost or repeated action does no harm.

Invariants kept here (letters of the design):

 H1 (B) `Acquire` only when no leader is in etcd, this node is in the in-sync set with the store it had then, its copy
        is whole or there is no better one, and every promise that it gave the old primary has run out.
 H2 (C) The gateway serves until `serve_until`, never later than the lease this node holds or the peer's grant.
 H3 (E) The address and the share are up only while this node leads and may serve.
 H5 (E) The addresses for reading are up only where the key `reader` is held, and never longer than this node's lease.
 H4     A gateway that was restarted leads only in a new epoch: what it had sent and not kept must not share its name.
"""

from dataclasses import dataclass

import msgspec

from storage.control import NEVER, Member, Report, Tell

READS_PATIENCE_S = 1.0  # the primary leaves the addresses for reading to the standby, where there is one
READS_HOLD_S = 2.0
A_DISK = "a disk"  # the name of a condition
FLOOR_S = 60.0  # etcd is told so often how far the log has come
DRAIN_S = 5.0  # whoever hands over waits this long for requests that are under way


@dataclass(frozen=True)
class State:
    """`state` in etcd."""

    cluster_id: str
    epoch: int
    primary: str
    in_sync: tuple[Member, ...]
    nonce: str  # marks the write that set this, so that a lost reply can be told from a lost request
    revision: int  # mod_revision, compared by every change
    lineage: str = ""  # which log the members hold; "" where it was never said
    floor: int = 0  # seq up to which each member has the log: one that ends before is an older image of it

    def member(self, node: str) -> Member | None:
        return next((member for member in self.in_sync if member.node == node), None)


@dataclass(frozen=True)
class Leader:
    """`leader` in etcd."""

    node: str
    lease: int
    revision: int  # create_revision


@dataclass(frozen=True)
class Switchover:
    """`switchover` in etcd: somebody wants the lease to go to this node."""

    to: str
    since: float  # when this node first saw it
    revision: int = 0


@dataclass(frozen=True)
class View:
    node: str
    peer: str
    now: float
    ttl_s: float
    started_at: float
    gateway_grace_s: float
    looked: bool  # etcd was read since this agent started
    etcd_ok: bool  # the following three were read not long ago
    state: State | None
    leader: Leader | None
    leader_absent_since: float | None
    lease: int  # this node's own lease, 0 if none
    lease_deadline: float  # until when it surely holds
    gateway: Report | None
    gateway_lost_at: float | None
    switchover: Switchover | None = None
    paused: bool = False  # `pause` in etcd: nobody takes over by itself
    peer_present: bool = True  # the other node's agent keeps its lease, and has no trouble
    trouble: str = ""  # why this node can't serve well: share, addresses or gateway keep failing
    draining_since: float | None = None  # since when this node makes ready to hand over
    maintained: bool = False  # this node is being worked on: it isn't to take over while the other one can
    reads_wanted: bool = False  # there are addresses for reading
    reads_able: bool = True  # they can be brought up here
    reads_able_at: float = NEVER  # when the gateway was last able to answer readers
    reads_given: bool = False  # this node has begun to give the key `reader` back: it may go at any moment
    reader: Leader | None = None  # who has them
    reader_absent_since: float | None = None
    up: bool = True  # the primary's addresses are here
    floor_at: float = NEVER  # when this agent last wrote how far the log has come
    gateway_dead: bool = False  # its process has ended, that is certain
    released: int = 0  # `released` in etcd: the gateway that led in this epoch is dead, by its own agent's word
    following: bool = False  # some of what follows the address runs here
    follow_stop_s: float = 0.0  # how long that may take to stop


@dataclass(frozen=True)
class CreateState:
    """First start of a cluster: this node alone is in sync, the other joins by catching up."""


@dataclass(frozen=True)
class Acquire:
    """Become leader in a new epoch with this in-sync set."""

    in_sync: tuple[Member, ...]


@dataclass(frozen=True)
class Bump:
    """Go on as leader in a new epoch: the gateway was restarted."""

    in_sync: tuple[Member, ...]


@dataclass(frozen=True)
class Change:
    """Write this in-sync set with this nonce, or how far the log has come."""

    in_sync: tuple[Member, ...]
    nonce: str
    floor: int = 0


@dataclass(frozen=True)
class Release:
    """`dead_in`: the gateway that led in this epoch is dead, the peer need keep no promise to it."""

    reason: str
    dead_in: int = 0


@dataclass(frozen=True)
class Serve:
    """Virtual addresses and share, here or not; the fence lets them through until `until`."""

    here: bool
    until: float = NEVER


@dataclass(frozen=True)
class TakeReads:
    """Become the one that has the addresses for reading."""


@dataclass(frozen=True)
class GiveReads:
    """Leave them to the other node."""


@dataclass(frozen=True)
class ServeReads:
    """The addresses for reading, here or not; the fence lets them through until `until`."""

    here: bool
    until: float = NEVER


@dataclass(frozen=True)
class StopFollowers:
    """The address is to go to the other node soon: what follows it is to end here."""


Who = CreateState | Acquire | Bump | Change | Release | Tell | Serve | StopFollowers
Action = Who | TakeReads | GiveReads | ServeReads


def decide(view: View) -> list[Action]:
    if (view.gateway is None or not view.looked) and view.now - view.started_at < view.ttl_s:
        return []  # a restarted agent looks first; what the one before left up ends by itself
    return [*_who_leads(view), *_who_reads(view)]


def _who_leads(view: View) -> list[Action]:
    gateway = view.gateway
    if gateway is None:
        return _without_gateway(view)
    if not view.etcd_ok:
        return _without_etcd(view, gateway)
    if view.state is None:
        create = [] if gateway.cluster_id or not gateway.whole else [CreateState()]
        return [Serve(False), Tell("follow"), *create]
    if gateway.cluster_id and gateway.cluster_id != view.state.cluster_id:
        return [Serve(False), Tell("follow")]
    if view.leader is None:
        return _leaderless(view, gateway, view.state)
    if view.leader.node == view.node:
        return _as_leader(view, gateway, view.state)
    return [Serve(False), Tell("follow")]


def check_invariants(view: View, actions: list[Action]) -> None:
    """Raise if `actions` would break what the head of this file promises. The agent calls it on every decision."""
    for action in actions:
        if isinstance(action, Acquire):
            gateway, state = view.gateway, view.state
            if view.leader is not None or gateway is None or state is None:
                raise ValueError("H1: acquire without a free lease")
            member = state.member(view.node)
            if member is None or member.store_id != gateway.store_id or not _whole_enough(view, gateway, state):
                raise ValueError("H1: acquire by a node that isn't in sync")
            if gateway.granted_until > view.now:
                raise ValueError("H1: acquire against a promise")
        if isinstance(action, Bump) and (view.gateway is None or view.state is None):
            raise ValueError("H1: a new epoch without a gateway")
        if isinstance(action, Bump) and view.gateway and view.state and view.gateway.promised > view.state.epoch:
            raise ValueError("H1: a new epoch by a state that knows less than this node has promised")
        if isinstance(action, Tell) and action.role == "lead" and action.serve_until > _authority(view):
            raise ValueError("H2: serving past the lease and the grant")
        if isinstance(action, Serve) and action.here and (action.until > _authority(view) or action.until <= view.now):
            raise ValueError("H3: address up without authority")
        if isinstance(action, ServeReads) and action.here and (not _reads_here(view) or action.until <= view.now):
            raise ValueError("H5: reading address up without its key")
        if isinstance(action, ServeReads) and action.until > view.lease_deadline:
            raise ValueError("H5: reading address up past the lease")


def _authority(view: View) -> float:
    """Until when this node may serve: by its lease on the leader key, or by the peer's promise."""
    holds = view.leader is not None and view.leader.node == view.node and view.leader.lease == view.lease
    by_lease = view.lease_deadline if holds else NEVER
    return max(by_lease, view.gateway.grant_until if view.gateway and view.gateway.leading else NEVER)


def _without_gateway(view: View) -> list[Action]:
    """One that is dead hands over to a node in sync at once. Of one that is only silent it isn't known what it does:
    keep lease and address for a moment, as for a restart without another node."""
    mine = view.leader is not None and view.leader.node == view.node
    state = view.state
    if mine and view.gateway_dead and view.etcd_ok and not view.paused and state and state.member(view.peer):
        return [Serve(False), Release("the gateway is dead", state.epoch)]
    lost_for = view.now - (view.gateway_lost_at if view.gateway_lost_at is not None else view.started_at)
    if mine and lost_for <= view.gateway_grace_s and _authority(view) > view.now:
        return []
    release: list[Action] = [Release("the gateway can't serve")] if mine and view.etcd_ok else []
    return [Serve(False), *release]


def _without_etcd(view: View, gateway: Report) -> list[Action]:
    if not gateway.leading:
        return [Serve(False), Tell("follow")]
    return _lead_on(view, gateway, (), gateway.leading)


def _lead_on(view: View, gateway: Report, in_sync: tuple[str, ...], epoch: int) -> list[Action]:
    until = _authority(view)
    may_serve = gateway.serving and gateway.leading == epoch and until > view.now
    answered = view.state.nonce if view.state and view.state.epoch == epoch else ""
    return [
        Tell("lead", epoch, in_sync, until, answered),
        Serve(True, until) if may_serve else Serve(False),
    ]


def _as_leader(view: View, gateway: Report, state: State) -> list[Action]:
    me = Member(view.node, gateway.store_id, gateway.incarnation)
    names = tuple(member.node for member in state.in_sync)
    if not gateway.fit and gateway.linked and state.member(view.peer) is not None and not view.paused:
        return [Serve(False), Tell("follow"), Release("this node has no disk to keep things on")]
    if gateway.leading == state.epoch:
        actions = _lead_on(view, gateway, names, state.epoch)
        if _hands_over(view, gateway, state):
            drained = not gateway.busy and gateway.last == gateway.peer_last and not view.following
            since = view.switchover.since if view.switchover else view.draining_since
            stop_s = view.follow_stop_s
            # What was proposed and isn't there yet would make this log the longer one, and the other node wait for it.
            if drained or (since is not None and view.now - since > DRAIN_S + stop_s):
                return [Serve(False), Tell("follow", resign=True), Release(view.trouble or "switchover")]
            if view.following and (since is None or view.now - since <= stop_s):
                actions.append(StopFollowers())  # first: images go on being taken meanwhile
            else:
                actions = [
                    msgspec.structs.replace(one, drain=True) if isinstance(one, Tell) else one for one in actions
                ]
        if gateway.asked and gateway.asked.nonce != state.nonce:
            members = _members(gateway.asked.members, me, gateway, state)
            if members:
                actions.append(Change(members, gateway.asked.nonce))
        elif gateway.commit > state.floor and view.now - view.floor_at > FLOOR_S:
            actions.append(Change(state.in_sync, state.nonce, gateway.commit))
        return actions
    if state.member(view.node) == me and gateway.promised < state.epoch:
        return _lead_on(view, gateway, names, state.epoch)
    found = conditions(view, gateway, state)
    blocks = next((one for one in found if one.hard and not one.holds and one.name != A_DISK), None)
    if blocks is not None:  # etcd was set back perhaps, to when this node had the lease
        return [Serve(False), Tell("follow"), Release(f"{blocks.name}: {blocks.says}")]
    return [Tell("follow"), Bump(_with_me(me, state))]


def _hands_over(view: View, gateway: Report, state: State) -> bool:
    """The other node is wanted as primary, or this one can't serve well, and the other is as good."""
    wanted = view.switchover is not None and view.switchover.to == view.peer
    return (wanted or (view.trouble != "" and not view.paused)) and _peer_ready(view, gateway, state)


def _peer_ready(view: View, gateway: Report, state: State) -> bool:
    return view.peer_present and gateway.linked and gateway.peer_whole and state.member(view.peer) is not None


def _leaderless(view: View, gateway: Report, state: State) -> list[Action]:
    if gateway.leading:
        # The lease was lost and nobody took it: serve on by the peer's grant, and lead again in a new epoch.
        until = _authority(view)
        if until <= view.now:
            return [Serve(False), Tell("follow")]
        return [*_lead_on(view, gateway, (), gateway.leading), *_acquire(view, gateway, state)]
    follow: list[Action] = [Serve(False), Tell("follow")]
    wanted = view.switchover is not None and view.switchover.to == view.node
    if not _candidate(view, gateway, state) or (view.paused and not wanted and state.primary != view.node):
        return follow
    since = view.leader_absent_since if view.leader_absent_since is not None else view.now
    if view.now - since < _patience_s(view, gateway, state):
        return follow
    if not gateway.withhold or gateway.granted_until > view.now:
        released = view.released if view.released == state.epoch else 0
        return [Serve(False), Tell("follow", withhold=True, released=released)]
    return [Serve(False), Tell("follow", withhold=True), *_acquire(view, gateway, state)]


def _acquire(view: View, gateway: Report, state: State) -> list[Action]:
    if not _candidate(view, gateway, state) or not view.lease or gateway.granted_until > view.now:
        return []
    me = Member(view.node, gateway.store_id, gateway.incarnation)
    return [Acquire(_with_me(me, state) if gateway.linked else (me,))]


@dataclass(frozen=True)
class Condition:
    """Something that must hold before this node leads, and how it is. `hard`: else it never leads by itself."""

    name: str
    holds: bool
    says: str
    hard: bool = True


def conditions(view: View, gateway: Report, state: State) -> list[Condition]:
    """All that `decide` asks before this node takes a free lease, in words; `tandem why` shows them."""
    member, names = state.member(view.node), ", ".join(one.node for one in state.in_sync) or "nobody"
    known = gateway.cluster_id in ("", state.cluster_id)
    same_log = gateway.lineage == state.lineage or not gateway.lineage or not state.lineage
    restored = f"etcd knows {state.epoch}: was it restored from a backup?"
    old = f"this gateway has promised epoch {gateway.promised}, {restored}"
    ahead = f"the other node has promised epoch {gateway.peer_promised}, {restored}"
    whole = "yes" if gateway.whole else "no better copy is there" if _whole_enough(view, gateway, state) else "not yet"
    fit = gateway.fit or state.member(view.peer) is None
    return [
        Condition("cluster", known, state.cluster_id if known else "etcd's is another cluster than this node's"),
        Condition("log", same_log, "the cluster's" if same_log else "this node holds another log than the cluster's"),
        Condition("in sync", member is not None, names),
        Condition("same store", member is None or member.store_id == gateway.store_id, gateway.store_id),
        Condition(
            "not an older image",
            member is None or member.incarnation <= gateway.incarnation,
            f"start {gateway.incarnation}, in sync since start {member.incarnation if member else '-'}",
        ),
        Condition(
            "not an older log",
            gateway.last[1] >= state.floor,
            f"it ends at {gateway.last[1]}, every node in sync had {state.floor}",
        ),
        Condition("epoch", gateway.promised <= state.epoch, "known" if gateway.promised <= state.epoch else old),
        Condition(
            "the other node's epoch",
            not gateway.linked or gateway.foreign or gateway.peer_promised <= state.epoch,
            ahead if gateway.linked and gateway.peer_promised > state.epoch else "known",
        ),
        Condition("complete copy", _whole_enough(view, gateway, state), whole),
        Condition(A_DISK, fit, "in service" if gateway.fit else "none in service"),
        Condition("no trouble", not view.trouble, view.trouble or "none", hard=False),
        Condition("no maintenance", not view.maintained, "none" if not view.maintained else "under way", hard=False),
        Condition(
            "not paused", not view.paused or state.primary == view.node, "paused" if view.paused else "no", hard=False
        ),
    ]


def _candidate(view: View, gateway: Report, state: State) -> bool:
    """In the in-sync set with the store it had then, not an older image of it, of this log, complete."""
    return all(one.holds for one in conditions(view, gateway, state) if one.hard)


def _whole_enough(view: View, gateway: Report, state: State) -> bool:
    """Whole; or there is no better copy: no other is in sync, or the peer is linked, isn't whole either, and its log
    isn't longer."""
    if gateway.whole or state.member(view.peer) is None:
        return True
    behind = gateway.peer_last is not None and gateway.last < gateway.peer_last
    return gateway.linked and not gateway.peer_whole and not behind


def _patience_s(view: View, gateway: Report, state: State) -> float:
    """How long a free lease is left to the other node, where that one may have the better claim."""
    if view.switchover is not None and gateway.linked and state.member(view.peer) is not None:
        return 0.0 if view.switchover.to == view.node else 2 * view.ttl_s
    if state.member(view.peer) is None:
        return 0.0 if gateway.whole else 2 * view.ttl_s  # a disk may still be on its way
    if view.maintained or (view.trouble and view.peer_present):
        return 4 * view.ttl_s
    if not gateway.linked or gateway.peer_last is None:
        booting = view.now - view.started_at < 2 * view.ttl_s
        return 2 * view.ttl_s if booting else 0.0
    if gateway.last != gateway.peer_last:
        return 0.0 if gateway.last > gateway.peer_last else 2 * view.ttl_s
    if gateway.missing > gateway.peer_missing:
        return min(3.0, view.ttl_s)  # the other node's copies are more nearly complete
    return 0.0 if state.primary == view.node else min(1.0, view.ttl_s / 3)


# -- the addresses for reading -----------------------------------------------------------------------------------------


def _who_reads(view: View) -> list[Action]:
    """The standby has them while it is complete and follows, else the primary."""
    if not view.reads_wanted:
        return []
    gateway, state = view.gateway, view.state
    may = view.reads_able and not view.trouble
    leads = gateway is not None and gateway.leading > 0 and _authority(view) > view.now
    if gateway is not None and leads and view.up and state is not None:  # its own come first
        may = may and not _peer_ready(view, gateway, state)
    if _reads_here(view):
        # What takes a moment, as a change of network does, isn't worth a change of place.
        able = gateway is not None and view.now - view.reads_able_at <= READS_HOLD_S
        if may and able and not view.reads_given and view.lease_deadline > view.now:
            return [ServeReads(True, view.lease_deadline)]
        return [ServeReads(False), GiveReads()] if view.etcd_ok else [ServeReads(False)]
    free = view.reader is None and view.etcd_ok and view.lease != 0 and view.lease_deadline > view.now
    since = view.reader_absent_since if view.reader_absent_since is not None else view.now
    able = gateway is not None and gateway.reads
    if may and able and free and (not leads or view.now - since > READS_PATIENCE_S):
        return [ServeReads(False), TakeReads()]
    return [ServeReads(False)]


def _reads_here(view: View) -> bool:
    return view.reader is not None and view.reader.node == view.node and view.reader.lease == view.lease


def _with_me(me: Member, state: State) -> tuple[Member, ...]:
    return tuple(me if member.node == me.node else member for member in state.in_sync)


def _members(wanted: tuple[str, ...], me: Member, gateway: Report, state: State) -> tuple[Member, ...]:
    """The wanted set with each node's present store, empty while the peer's isn't known."""
    known = {member.node: member for member in state.in_sync} | {me.node: me}
    if gateway.peer:
        known[gateway.peer.node] = gateway.peer
    return tuple(known[node] for node in sorted(wanted)) if known.keys() >= set(wanted) else ()
