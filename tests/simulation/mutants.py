"""Deliberate bugs. The simulation must catch each of them; that shows that its checks see something."""

from dataclasses import replace

from ha import decide
from storage.control import Tell
from storage.replication.duty import Duty
from storage.replication.effects import Persist, Publish
from storage.replication.messages import Ping, Prepare
from storage.replication.replica import Replica
from tests.simulation.gateway import SimGateway


class _AckBeforePeer(Replica):
    def _advance(self) -> None:
        if self.leading and self.durable > self.commit:
            self.commit = self.durable
            self._out.append(Publish(self.commit))


class AckBeforePeer(SimGateway):
    """Success is said when this node alone holds the bytes."""

    core_class = _AckBeforePeer


class _ShrinkWithoutCompare(Replica):
    def _ask_to_go_alone(self) -> None:
        super()._ask_to_go_alone()
        self.in_sync.required = self.in_sync.confirmed = frozenset({self.node})
        self._advance()


class ShrinkWithoutCompare(SimGateway):
    """The primary goes on alone before etcd has agreed."""

    core_class = _ShrinkWithoutCompare


class _NoRollForward(Replica):
    @property
    def rolled_forward(self) -> bool:
        return self.leading


class RollForwardSkipped(SimGateway):
    """A promoted node serves before what it had prepared is visible."""

    core_class = _NoRollForward


class _StaleDuty(Duty):
    def tell(self, tell: Tell) -> None:
        super().tell(tell)
        if tell.role == "lead":
            self.serve_until = float("inf")


class ServePastLease(SimGateway):
    """A primary whose lease has run out goes on answering reads."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.duty.__class__ = _StaleDuty


class _AlwaysGrant(Replica):
    def _on_ping(self, ping: Ping, now: float) -> None:
        withhold, self.grants.withhold = self.grants.withhold, False
        before = self.grants.given_until
        super()._on_ping(ping, now)
        self.grants.withhold, self.grants.given_until = withhold, before


class GrantForgotten(SimGateway):
    """The follower promises not to be promoted and doesn't remember it."""

    core_class = _AlwaysGrant


class _OwesAll(Replica):
    def _on_prepare(self, prepare: Prepare, now: float) -> None:
        super()._on_prepare(prepare, now)
        self._out = [replace(one, owed=True) if isinstance(one, Persist) else one for one in self._out]


class BytesLaterThanAcknowledged(SimGateway):
    """A follower acknowledges before it has the bytes also what wasn't committed without it."""

    core_class = _OwesAll


class ReadingWithoutKey(SimGateway):
    """A node brings the addresses for reading up without holding their key in etcd."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        decide._reads_here = lambda _: True  # for good: this process runs nothing else


MUTANTS = (
    AckBeforePeer,
    ShrinkWithoutCompare,
    RollForwardSkipped,
    ServePastLease,
    GrantForgotten,
    BytesLaterThanAcknowledged,
    ReadingWithoutKey,
)
