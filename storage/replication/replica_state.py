"""The state of the replication core, and what may be known of it from outside."""

from dataclasses import dataclass, field

from storage.replication.effects import Effect, InvariantBroken, Limits, Role
from storage.replication.epochs import Epochs
from storage.replication.grants import Grants
from storage.replication.in_sync import InSyncSet
from storage.replication.messages import Hello, Welcome
from storage.replication.progress import Progress


@dataclass
class ReplicaState:
    """What the core knows, and what callers may look at; only the core changes it."""

    node: str
    peer: str | None
    cluster: str
    store_id: str
    incarnation: int
    promised: int
    epochs: Epochs
    durable: int  # last entry that would survive a power cut here
    commit: int  # last entry known to be committed
    whole: bool = True  # False: this copy is known to lack something; never to be promoted
    limits: Limits = field(default_factory=Limits)
    lineage: str = ""  # which log this is; "" while there is none

    role: Role = Role.FOLLOWER
    epoch: int = 0  # as leader
    peer_hello: Hello | None = None
    peer_last: tuple[int, int] | None = None
    peer_info: bytes = b""
    missing: int = 0  # copies that this node lacks, for the other one to know,
    counted: int = 0  # of all entries up to here
    instances: int = 0  # how many this node has, applied
    rows: int = 0  # about how much there is to a state: instances, and files of the share
    needs_features: int = 0  # what a node must be able to carry out to understand this log, see `messages.FEATURES`
    forgotten: int = 0  # entries up to here may be Void though they said something: who lacks them takes the state
    peer_missing: int = 0  # copies that the peer says it lacks,
    peer_counted: int = 0  # of all entries up to here; 0 before it has said so on this link
    peer_unfit: bool = False  # the peer says that it can't keep anything
    peer_foreign: bool = False  # the peer's log is another one: the two are never matched
    grants: Grants = field(default_factory=Grants)

    def __post_init__(self) -> None:
        self.in_sync = InSyncSet(self.node)
        self._out: list[Effect] = []
        self._linked = False
        self.heard_at = 0.0
        self.read_from = float("-inf")  # follower: when it sent what the leader's last Ping echoes (own clock)
        self._ticked_at = self._pinged_at = float("-inf")
        self._echo = float("-inf")  # leader: the `at_s` of the follower's last Pong, for it to see in the next Ping
        self._lost_at: float | None = float("-inf")  # when the peer was last known to be there; None while it is
        self._f = Progress()
        self._session = 0
        self._lead_from = 0
        self._greeted_at = 0.0
        self._stalled_at: float | None = None  # since when commits wait for the follower without any progress
        self._acked_max = 0
        self._peer_store = ""  # what follows is of this store
        self._owed_from = self._owed_upto = 0  # after the one, up to the other: sent when they were committed already
        self._adopting: Welcome | None = None
        self._following: Welcome | None = None
        self._greeting: Hello | None = None  # a leader's Hello that waits until nothing is in flight here
        if self.epochs.last[1] != self.durable:
            raise InvariantBroken(f"log ends at {self.epochs.last[1]}, {self.durable} is durable")

    # -- what callers may look at ------------------------------------------------------------------------------

    @property
    def accepted(self) -> int:
        """Last entry in the log, durable or on its way to the disk."""
        return self.epochs.last[1]

    @property
    def last(self) -> tuple[int, int]:
        return self.epochs.last

    @property
    def leading(self) -> bool:
        return self.role is Role.LEADER

    @property
    def linked(self) -> bool:
        """The peer has been heard on the present link. A link alone says little: a frozen node's kernel takes it."""
        return self._linked and self._lost_at is None

    @property
    def peer_acked(self) -> int:
        return self._f.acked

    @property
    def peer_lacks(self) -> int:
        """Copies that the peer lacks: what it says, and what was sent since without the bytes."""
        return self.peer_missing + max(0, self._owed_upto - max(self._owed_from, self.peer_counted))

    @property
    def live(self) -> bool:
        """Leader: the follower has been sent everything, so bytes may be streamed to it as they arrive."""
        return self.leading and self._f.joined and self._f.next_seq > self.accepted

    @property
    def joined(self) -> bool:
        """Follower: following a leader's log; leader: being followed."""
        return self._f.joined if self.leading else self._following is not None

    def follows(self, epoch: int, session: int) -> bool:
        """Follower: of the leader that it follows now."""
        return self._following is not None and self._following.of == (epoch, session)

    @property
    def rolled_forward(self) -> bool:
        """Leader: everything that any earlier leader may have acknowledged is committed and published here."""
        return self.leading and self.commit >= self._lead_from

    @property
    def session(self) -> int:
        return self._f.session

    @property
    def idle(self) -> bool:
        """Nothing is on its way to this node's disk, so that the role may change."""
        return self.durable == self.accepted and self._adopting is None

    @property
    def whole_at(self) -> int | None:
        """Follower: this copy is complete once this entry is durable."""
        return self._following.commit if self._following else None
