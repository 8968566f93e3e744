"""Which nodes a commit waits for, and which set is asked to be in force in etcd. Pure."""

from dataclasses import dataclass

from storage.replication.effects import InvariantBroken


@dataclass(frozen=True)
class Ask:
    """The in-sync set this leader wants to be in force; `token` names the request."""

    token: int
    members: frozenset[str]


@dataclass
class InSyncSet:
    """A leader's. `required` grows before a larger set is asked for and shrinks only by the answer to the latest ask,
    whose write came after the asking: so it always covers each set that may be in force. `confirmed` is the one that
    was last known to be. All are empty while this node doesn't lead."""

    node: str
    required: frozenset[str] = frozenset()
    confirmed: frozenset[str] = frozenset()
    ask: Ask | None = None
    _token: int = 0

    @property
    def alone(self) -> bool:
        """Commits wait for nobody else."""
        return self.required == {self.node}

    @property
    def wanted(self) -> frozenset[str]:
        """What is asked for, or else what is required."""
        return self.ask.members if self.ask else self.required

    def begin(self, members: frozenset[str]) -> None:
        """This node leads; `members` are in force."""
        self.required, self.confirmed, self.ask = members, members, None

    def end(self) -> None:
        """It doesn't lead any more."""
        self.required = self.confirmed = frozenset()
        self.ask = None

    def wait_for(self, members: frozenset[str]) -> None:
        """Commits wait for these too from here on."""
        self.required = self.required | members

    def ask_for(self, members: frozenset[str]) -> None:
        """Have this set in force."""
        self._token += 1
        self.wait_for(members)
        self.ask = Ask(self._token, members)

    def answered(self, token: int) -> bool:
        """The set asked for under `token` is in force. Returns whether that was the latest."""
        if self.ask is None or self.ask.token != token:
            return False
        self.required = self.confirmed = self.ask.members
        self.ask = None
        return True

    def check(self, *, leading: bool) -> None:
        """Raises InvariantBroken."""
        if not leading:
            good = not (self.required or self.ask)
        else:
            covered = self.confirmed | (self.ask.members if self.ask else frozenset())
            good = self.node in self.required and covered <= self.required
        if not good:
            raise InvariantBroken(
                f"commits wait for {set(self.required)}, in force may be {self.confirmed}, {self.ask}"
            )
