"""The replication core: one node's view of the pair's log. Pure: no sockets, files, clocks, threads or chance.

Feed it what happened (`lead`, `propose`, `persisted`, `linked`, `receive`, `tick` ...), then `take()` the effects and
carry them out in order. Time is a parameter, in seconds of any steady clock of this node.

Invariants kept here (letters of the design):

 R1 (A) An entry is committed only when it is durable here and acknowledged by every other member of `required`.
 R2 (B) Nothing is accepted from an epoch below `promised`; a promise is durable before it is answered.
 R3 (B) `required` shrinks only by the answer to the latest ask, a compare-and-swap that came after any expansion.
        It grows before the expansion is asked for. So it always covers every in-sync set that may be in force.
 R4 (C) Nothing committed is truncated.
 R5 (C) A leader serves nobody before it has committed all that it held when it began to lead.
 R6     Bounded: at most `window` entries are sent and not acknowledged.
 R7 (A) The bytes of an entry may come after its acknowledgement only if it was committed without this follower.
 R8     A follower promises not to be promoted (`grant_s`) only to the leader that it follows, never while `withhold`.
"""

from typing import Final

from msgspec.structs import replace

from storage.replication.effects import (
    Effect,
    InvariantBroken,
    Publish,
    Role,
    Send,
    SteppedDown,
    Transmit,
)
from storage.replication.epochs import Epochs
from storage.replication.following import Following
from storage.replication.messages import (
    TAKES_STATE,
    Ack,
    AnyMessage,
    Deny,
    Hello,
    Joined,
    Ping,
    Pong,
    Prepare,
    Resign,
    Welcome,
)
from storage.replication.progress import Progress, Stage

STATE_SHARE: Final = 16  # the state is had quicker than the log if so much of it has changed, one part in so many


class Replica(Following):
    def take(self) -> list[Effect]:
        """What is to be done now, after one input or several. Raises InvariantBroken."""
        self._check()
        out, self._out = self._out, []
        return out

    def _check(self) -> None:
        if not self.commit <= self.durable <= self.accepted:
            raise InvariantBroken(f"committed {self.commit}, durable {self.durable}, accepted {self.accepted}")
        self.in_sync.check(leading=self.leading)
        if self.leading:
            self._f.check(self.limits.window)

    # -- roles -------------------------------------------------------------------------------------------------

    def good_enough(self, in_sync: frozenset[str]) -> bool:
        """This copy is whole, or there is no better one: it is alone in sync, or the peer's isn't whole either."""
        return self.whole or in_sync == {self.node} or (self.peer_hello is not None and not self.peer_hello.whole)

    def lead(self, epoch: int, in_sync: frozenset[str], now: float) -> None:
        """Lead in `epoch`, which the caller won in etcd and has made durable as this node's promise."""
        if epoch < self.promised or epoch <= max(self.epoch, self.last[0]):
            raise InvariantBroken(f"can't lead in epoch {epoch}: promised {self.promised}, log ends in {self.last}")
        if not self.idle or not self.good_enough(in_sync):
            raise InvariantBroken("can't lead with entries in flight, or with an incomplete copy beside another")
        if now < self.grants.given_until:
            raise InvariantBroken("can't lead while a promise not to is in force")
        if self.node not in in_sync:
            raise InvariantBroken("can't lead from outside the in-sync set")
        self.role, self.epoch, self.promised = Role.LEADER, epoch, epoch
        self.in_sync.begin(in_sync)
        self.grants.begin()
        self._following = self._greeting = None
        self._f = Progress()
        self._lost_at = None if self.linked else now
        self._lead_from = self.accepted
        self._stalled_at, self._acked_max = None, 0
        self._advance()
        if self._linked:
            self._greet(now)

    def follow(self, *, resign: bool = False) -> None:
        """Stop leading. The log stays until a leader's Welcome. `resign`: nothing is served here, the peer is free."""
        if self.leading:
            if resign:
                self._out.append(Send(Resign(self.epoch, self._f.session)))
            self.role = Role.FOLLOWER
            self.in_sync.end()
            self._f = Progress()
            self._out.append(SteppedDown(self.promised))

    # -- log ---------------------------------------------------------------------------------------------------

    def propose(self, now: float) -> int:
        """Append one entry as leader; returns its seq. The caller keeps it at hand for `Transmit`."""
        if not self.leading:
            raise InvariantBroken("only a leader proposes")
        seq = self.accepted + 1
        self.epochs.append(self.epoch, seq)
        if self._f.acked == seq - 1:
            self._f.moved_at = now
        self._transmit()
        return seq

    def persisted(self, seq: int) -> None:
        """Entries up to `seq` and their bytes would survive a power cut here."""
        if seq > self.accepted:
            raise InvariantBroken(f"entry {seq} persisted, only {self.accepted} accepted")
        if seq <= self.durable:
            return
        self.durable = seq
        if self.leading:
            self._advance()
        elif self._following:
            self._out.append(Send(Ack(self._following.epoch, self._following.session, seq)))
        self._answer_greeting()

    def forget(self, upto: int, now: float) -> None:
        """Entries up to there are about to lose what they say. Whoever is about to be sent them takes the state."""
        self.forgotten = max(self.forgotten, upto)
        if self.leading and self._f.stage is not Stage.UNLINKED and self._f.acked < upto:
            self._end_link("it hasn't got what is forgotten from now on", now)

    def need(self, features: int) -> None:
        """The log says something that older versions don't understand: they are no longer welcome as followers."""
        self.needs_features = max(self.needs_features, features)

    def alive(self, now: float) -> None:
        """Something came from the peer on the present link, if only a part of a message."""
        if self._linked and self._lost_at is None:
            self.heard_at = max(self.heard_at, now)

    def progress(self, now: float) -> None:
        """The follower has taken bytes: it is slow, not stuck."""
        self._f.moved_at = now
        if self._stalled_at is not None:
            self._stalled_at = now

    def promise(self, epoch: int) -> None:
        """Note a promise that the caller has made durable."""
        self.promised = max(self.promised, epoch)

    def answered(self, token: int) -> None:
        """The set asked for under `token` is in force in etcd, by a write that came after the asking."""
        if self.in_sync.answered(token):
            self._advance()

    # -- the link ----------------------------------------------------------------------------------------------

    def linked_up(self, now: float) -> None:
        self._linked, self.heard_at = True, now
        self._pinged_at = float("-inf")
        self._following = self._greeting = None
        self._f.stage = Stage.UNLINKED
        self.peer_counted = 0
        if self.leading:
            self._greet(now)
        else:
            self._out.append(Send(self._hello(0)))

    def tick(self, now: float) -> None:
        """To be called several times a second; that it wasn't is no fault of the peer."""
        self._allow_for_pause(now)
        if self._linked:
            if now - self.heard_at > self.limits.peer_timeout_s:
                self._end_link("the peer is silent", self.heard_at)
            elif now - self._pinged_at >= self.limits.ping_interval_s:
                self._pinged_at = now
                session = self._f.session if self.leading and self._f.joined else 0
                counted = (self.missing, self.counted, self._adopting.session if self._adopting else 0)
                ping = Ping(self.promised, session, self.commit, now, self._echo, *counted, self.leading)
                self._out.append(Send(ping))
        if self.leading:
            self._tick_leader(now)
            waited = now - max(self._greeted_at, self._f.adopting_at)
            if self._linked and not self._f.joined and waited > self.limits.greet_again_s:
                self._greet(now)

    def _allow_for_pause(self, now: float) -> None:
        """A node that stood still itself, as a virtual machine does while it is moved, has heard nobody meanwhile."""
        paused = now - self._ticked_at
        self._ticked_at = now
        if not self.limits.pause_s < paused < float("inf"):
            return
        self.heard_at += paused
        self._f.moved_at += paused
        if self._lost_at is not None:
            self._lost_at += paused
        if self._stalled_at is not None:
            self._stalled_at += paused

    def _tick_leader(self, now: float) -> None:
        if self._f.waiting and now - self._f.moved_at > self.limits.ack_timeout_s:
            self._end_link("the peer answers but doesn't acknowledge", now - self.limits.peer_timeout_s)
        required = self.in_sync.required
        if self.commit == self.durable or self._f.acked > self._acked_max or self.peer not in required:
            self._stalled_at = None
            self._acked_max = max(self._acked_max, self._f.acked)
        elif self._stalled_at is None:
            self._stalled_at = now
        stalled = self._stalled_at is not None and now - self._stalled_at > self.limits.ack_timeout_s
        lost = self._lost_at is not None and now - self._lost_at >= self.limits.peer_timeout_s
        if (lost or stalled or self.peer_unfit) and self.peer in required:
            self._ask_to_go_alone()
        self._expand()

    # -- messages ----------------------------------------------------------------------------------------------

    def receive(self, message: AnyMessage, now: float) -> None:
        self.heard_at, self._lost_at = now, None
        match message:
            case Hello():
                self._on_hello(message, now)
            case Welcome():
                self._on_welcome(message)
            case Joined():
                self._on_joined(message, now)
            case Prepare():
                self._on_prepare(message, now)
            case Ack():
                self._on_ack(message, now)
            case Ping():
                self._on_ping(message, now)
            case Pong():
                self._on_pong(message)
            case Resign():
                if self._following and (message.epoch, message.session) == self._following.of:
                    self.grants.release()
            case Deny():
                self._on_deny(message.promised)

    def _on_hello(self, hello: Hello, now: float) -> None:
        if hello.cluster != self.cluster or hello.node != self.peer:
            self._end_link(f"the other side is {hello.node} of cluster {hello.cluster}", now)
            return
        if hello.store_id != self._peer_store:
            self._peer_store, self._owed_from, self._owed_upto = hello.store_id, 0, 0
        self.peer_hello = hello
        self.peer_last = hello.epochs[-1] if hello.epochs else (0, 0)
        self.peer_foreign = bool(self.lineage and hello.lineage and self.lineage != hello.lineage)
        if self.peer_foreign:
            if self.leading and self.peer in self.in_sync.required:
                self._ask_to_go_alone()
            return
        if hello.leading:
            if hello.promised < self.promised:
                self._out.append(Send(Deny(self.promised)))
                return
            if self.leading:
                self._on_deny(hello.promised)
            self._greeting = hello
            self._answer_greeting()
        elif self.leading:
            if hello.promised > self.epoch:
                self._on_deny(hello.promised)
            elif hello.session == self._f.session:
                self._welcome(hello, now)

    def _welcome(self, hello: Hello, now: float) -> None:
        match = self.epochs.common(Epochs(hello.epochs))
        self._f = Progress(Stage.GREETED, self._f.session, match + 1, match, match, hello.whole, now)
        behind = match < self.commit or not hello.whole
        if behind and self.peer in self.in_sync.required:
            self._ask_to_go_alone()
        behind_by, must = self.commit - match, match < self.forgotten
        far = self.rolled_forward and behind_by > max(self.limits.state_after, self.rows // STATE_SHARE)
        state = (far or must) and hello.features >= TAKES_STATE
        if hello.features < self.needs_features:
            return  # it wouldn't understand what the log says; it may go on giving copies of what it has
        if must and not state:
            return  # an older version can't; it may go on giving copies of what it has
        self._out.append(Send(Welcome(self.epoch, self._f.session, match, self.commit, self.lineage, state, must)))

    def _on_joined(self, joined: Joined, now: float) -> None:
        f = self._f
        ours = (joined.epoch, joined.session) == (self.epoch, f.session)
        if self.leading and ours and f.stage is Stage.GREETED:
            if joined.seq < self.forgotten:
                return  # it has to take the state, and is greeted again
            if joined.seq >= f.next_seq:  # by taking the state
                if joined.seq > self.commit:
                    raise InvariantBroken(f"the peer has taken {joined.seq} entries, {self.commit} are committed")
                self._note_owed(f.next_seq, joined.seq)
            f.join(joined.seq, now)
            self._advance()
            self._transmit()
            self._expand()

    def _on_ack(self, ack: Ack, now: float) -> None:
        f = self._f
        if not self.leading or (ack.epoch, ack.session) != (self.epoch, f.session) or not f.joined:
            return
        if f.acknowledge(ack.seq, now):
            self._advance()
            self._transmit()
            self._expand()

    def _on_ping(self, ping: Ping, now: float) -> None:
        following = self._following
        ours = following is not None and (ping.epoch, ping.session) == following.of
        self.peer_missing, self.peer_counted = ping.missing, ping.counted
        if self.peer_hello is not None and ping.leads is not None:  # it may have stopped since its Hello
            self.peer_hello = replace(self.peer_hello, leading=ping.leads)
        if self.leading and ping.adopting == self._f.session:
            self._f.adopting_at = now
        if ours:
            self.read_from = max(self.read_from, min(ping.echo_s, now))
            self._learn_commit(ping.commit)
        elif ping.session and ping.epoch < self.promised:
            self._out.append(Send(Deny(self.promised)))
        grant = ours and self.grants.give(now + self.limits.grant_s)
        self._out.append(
            Send(Pong(ping.epoch, ping.session, ping.sent_s, grant, self.whole, self._settled().last, b"", now))
        )

    def _on_pong(self, pong: Pong) -> None:
        self.peer_last, self.peer_info = pong.epochs_last, pong.info or self.peer_info
        self.peer_hello = self.peer_hello and replace(self.peer_hello, whole=pong.whole)
        ours = (pong.epoch, pong.session) == (self.epoch, self._f.session)
        self._echo = pong.at_s if ours else self._echo
        if self.leading and self._f.joined and ours:
            self._f.whole = pong.whole
            if pong.grant:
                self.grants.take(pong.sent_s + self.limits.grant_s - self.limits.grant_margin_s)
            self._expand()

    def _on_deny(self, promised: int) -> None:
        if self.leading and promised > self.epoch:
            self.follow()

    # -- helpers -----------------------------------------------------------------------------------------------

    def _greet(self, now: float) -> None:
        self._session += 1
        self._greeted_at = now
        acked = self._f.acked
        self._f = Progress(session=self._session, acked=acked)
        self._out.append(Send(self._hello(self._session)))

    def _transmit(self) -> None:
        f = self._f
        if not f.joined:
            return
        last = min(self.accepted, f.acked + self.limits.window)
        if last >= f.next_seq:
            self._note_owed(f.next_seq, min(last, self.commit))
            self._out.append(Transmit(f.session, f.next_seq, last, self.commit))
            f.next_seq = last + 1

    def _note_owed(self, first: int, last: int) -> None:
        """The follower may take these without their bytes."""
        if first <= last and self.peer_hello is not None and self.peer_hello.features >= TAKES_STATE:
            outstanding = self._owed_upto > self.peer_counted
            self._owed_from = min(self._owed_from, first - 1) if outstanding else first - 1
            self._owed_upto = last

    def _advance(self) -> None:
        if not self.leading:
            return
        floor = self.durable
        if not self.in_sync.alone:
            floor = min(floor, self._f.acked)
        if floor > self.commit:
            self.commit = floor
            self._out.append(Publish(floor))

    def _ask_to_go_alone(self) -> None:
        if self.in_sync.wanted != (alone := frozenset({self.node})):
            self.in_sync.ask_for(alone)

    def _expand(self) -> None:
        """Bring a follower that keeps up into the in-sync set.

        First commits wait for it, so that it reaches what is committed even under load; then the set is asked for.
        """
        if self.peer is None or self.peer_unfit or not (self.live and self._f.whole):
            return
        if not self._f.proven and self._f.joined_at < self.accepted:
            return  # linked, but it hasn't shown yet that it can keep anything
        both = frozenset({self.node, self.peer})
        if self.in_sync.wanted == both and (self.in_sync.ask or self.in_sync.confirmed == both):
            return
        self.in_sync.wait_for(both)
        if self._f.acked >= self.commit:
            self.in_sync.ask_for(both)
