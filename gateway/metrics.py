"""What is counted while the gateway works, for Prometheus; and the one line that each service leaves in the log."""

from typing import Any, Final, Protocol, TypeVar, cast

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
)

from conf import VERSION
from gateway.dicom.dimse import Command, Request, Status, is_failure

log = structlog.get_logger()

M = TypeVar("M", Counter, Histogram)
SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
SERVICES: Final = {
    Command.C_STORE_RQ: "C-STORE",
    Command.C_FIND_RQ: "C-FIND",
    Command.C_GET_RQ: "C-GET",
    Command.C_MOVE_RQ: "C-MOVE",
    Command.C_ECHO_RQ: "C-ECHO",
    Command.N_ACTION_RQ: "N-ACTION",
}
REASONS: Final = {
    Status.OUT_OF_RESOURCES: "out of resources",
    Status.DATA_SET_MISMATCH: "data set mismatch",
    Status.CANNOT_UNDERSTAND: "cannot understand",
    Status.DUPLICATE_SOP_INSTANCE: "duplicate",
    Status.CANNOT_PERFORM: "no sub-operation succeeded",
}


class Outcome(Protocol):
    status: int | None
    comment: str
    bytes: int
    count: int


class Peer(Protocol):
    @property
    def who(self) -> dict[str, str]: ...


class Done(Protocol):
    """A request that was dealt with."""

    @property
    def request(self) -> Request: ...
    @property
    def outcome(self) -> Outcome: ...
    @property
    def peer(self) -> Peer: ...


class Meter:
    """One of a process."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        Info("tandem_build", "This program", registry=registry).info({"version": VERSION})
        self._requests = Counter(
            "tandem_requests", "Requests by service and outcome", ["service", "outcome"], registry=registry
        )
        self._refused = Counter(
            "tandem_refused", "Requests refused, by reason", ["service", "reason"], registry=registry
        )
        self._seconds = Histogram(
            "tandem_request_seconds",
            "From the last byte to the answer",
            ["service"],
            buckets=SECONDS,
            registry=registry,
        )
        self.commit = Histogram(
            "tandem_commit_seconds",
            "From the proposal of an entry until both nodes have it",
            buckets=SECONDS,
            registry=registry,
        )
        self.sync = Histogram("tandem_sync_seconds", "Of the file of an object", buckets=SECONDS, registry=registry)
        self._received = Counter("tandem_received_bytes", "Bytes of data sets that were stored", registry=registry)
        self._answers = Counter("tandem_answers", "Answers and sub-operations", ["service"], registry=registry)
        self._associations = Counter("tandem_associations", "Associations asked for", ["outcome"], registry=registry)
        self._children: dict[tuple[object, ...], Any] = {}

    def done(self, call: Done, seconds: float) -> None:
        """A request has ended; one without a status was cut off."""
        outcome, request = call.outcome, call.request
        service = SERVICES.get(request.field, "other")  # type: ignore[call-overload]
        status = outcome.status
        how = "aborted" if status is None else "refused" if is_failure(status) else "done"
        self._child(self._requests, service, how).inc()
        self._child(self._seconds, service).observe(seconds)
        if how == "refused":
            self._child(self._refused, service, REASONS.get(status, "other")).inc()  # type: ignore[call-overload]
        elif how == "done" and outcome.bytes:
            self._received.inc(outcome.bytes)
        if outcome.count:
            self._child(self._answers, service).inc(outcome.count)
        if service == "C-ECHO":
            return
        more: dict[str, object] = {
            name: value for name, value in (("bytes", outcome.bytes), ("count", outcome.count)) if value
        }
        if outcome.comment:
            more["why"] = outcome.comment
        log.info(
            "service.done",
            service=service,
            status="none" if status is None else f"0x{status:04X}",
            ms=round(seconds * 1000, 1),
            **more,
            **call.peer.who,
        )

    def association(self, outcome: str) -> None:
        """`outcome`: "accepted", "rejected"."""
        self._child(self._associations, outcome).inc()

    def _child(self, metric: M, *labels: str) -> M:
        """`labels` looks its children up with a lock and a sort each time."""
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return cast(M, child)
