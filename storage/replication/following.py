"""The follower's side of the replication core, and what both sides share of it. Pure."""

from storage.replication.effects import Adopt, DropLink, InvariantBroken, Persist, Publish, Send
from storage.replication.epochs import Epochs
from storage.replication.messages import FEATURES, Deny, Hello, Joined, Prepare, Welcome
from storage.replication.progress import Stage
from storage.replication.replica_state import ReplicaState


class Following(ReplicaState):
    def abandon(self) -> None:
        """Follower: entries that were accepted and can't be made durable are forgotten again."""
        if self.leading:
            raise InvariantBroken("a leader doesn't abandon entries")
        self.epochs.truncate(self.durable)
        if self._linked and self._following:  # its leader would wait for acknowledgements that never come
            self._end_link("entries of this link were given up", self.heard_at)
        self._following = None
        self._answer_greeting()

    def adopted(self, epoch: int, match: int, state: tuple[tuple[int, int], ...] | None = None) -> None:
        """`state`: the leader's was taken; the epochs of the log up to its end. All of it is durable here, and was
        committed."""
        welcome = self._adopting
        if welcome is None or welcome.epoch != epoch or welcome.match != match:
            return
        self._adopting = None
        self.lineage = self.lineage or welcome.lineage
        self.promised = max(self.promised, epoch)
        self.epochs.truncate(match)
        self.durable = min(self.durable, match)
        if state is not None:
            self._took(Epochs(state), match)
        enough = state is not None or not welcome.must  # else the leader's next greeting is another try
        if self._linked and epoch == self.promised and enough:
            self._following = welcome
            self._out.append(Send(Joined(epoch, welcome.session, self.durable)))
        self._answer_greeting()

    def _took(self, epochs: Epochs, match: int) -> None:
        end = epochs.last[1]
        if end < self.commit or epochs.common(self.epochs) < min(match, end):
            raise InvariantBroken(f"a state that ends at {epochs.last} isn't of the log that ends at {self.last}")
        self.epochs = epochs
        self.durable = self.commit = end

    def _end_link(self, why: str, now: float) -> None:
        self._out.append(DropLink(why))
        self.unlinked(now)

    def unlinked(self, now: float) -> None:
        self._lost_at = now if self._lost_at is None else self._lost_at
        if not self._linked:
            return
        self._linked = False
        self._following = self._greeting = None
        self.peer_hello = self.peer_last = None
        self._f.stage = Stage.UNLINKED

    def _on_welcome(self, welcome: Welcome) -> None:
        if self.leading or welcome.epoch < self.promised:
            if welcome.epoch < self.promised:
                self._out.append(Send(Deny(self.promised)))
            return
        if not self.idle or self._following is not None:
            return  # not the answer to our last Hello; the leader's next one restarts the exchange
        if welcome.match < self.commit:
            raise InvariantBroken(f"leader of epoch {welcome.epoch} shares {welcome.match}, {self.commit} is committed")
        if self.lineage and welcome.lineage and welcome.lineage != self.lineage:
            self.peer_foreign = True
            return
        self._adopting = welcome
        if welcome.state:
            self._learn_commit(min(welcome.match, welcome.commit))  # a state is added to what is applied
        self._out.append(Adopt(welcome.epoch, welcome.match, welcome.lineage, welcome.state))

    def _on_prepare(self, prepare: Prepare, now: float) -> None:
        following = self._following
        if prepare.epoch < self.promised:
            self._out.append(Send(Deny(self.promised)))
            return
        if following is None or (prepare.epoch, prepare.session) != (following.epoch, following.session):
            return
        if prepare.seq == self.accepted + 1:
            self.epochs.append(prepare.entry_epoch, prepare.seq)
            owed = prepare.seq <= prepare.commit
            self._out.append(Persist(prepare.seq, prepare.entry_epoch, prepare.entry, prepare.stream, owed))
        elif prepare.seq > self.accepted:
            self._end_link(f"entry {prepare.seq} follows {self.accepted}", now)
            return
        self._learn_commit(prepare.commit)

    def _settled(self) -> Epochs:
        """The durable part of the log."""
        settled = Epochs(self.epochs.pairs)
        settled.truncate(self.durable)
        return settled

    def _hello(self, session: int) -> Hello:
        me = (self.cluster, self.node, self.store_id, self.incarnation)
        log = (self._settled().pairs, self.commit, self.whole)
        return Hello(*me, self.promised, self.leading, session, *log, self.lineage, FEATURES)

    def _answer_greeting(self) -> None:
        if self._greeting and self._linked and self.idle and not self.leading:
            greeting, self._greeting = self._greeting, None
            self._following = None
            self._out.append(Send(self._hello(greeting.session)))

    def _learn_commit(self, commit: int) -> None:
        commit = min(commit, self.durable)
        if commit > self.commit:
            self.commit = commit
            self._out.append(Publish(commit))
