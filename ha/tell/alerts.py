"""What people should hear of: found by comparing the status of this node with what is usual. Pure; `sinks.py` tells.

A condition holds or it doesn't; it is told when it has held for a while, again while it lasts, and when it is over.
An event is told once. Texts name nodes, paths, addresses and AE titles, never patients.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from conf.settings import AlertSettings

MAINTENANCE_S: Final = 8 * 3600.0
OWN: Final = ("quorum", "quarantine", "certificate", "gateway", "maintenance")  # known without the gateway
EXPIRES_SOON_S: Final = 30 * 86400.0
BAD_STATES: Final = ("failed", "offline", "foreign", "read-only", "hung")

State = Literal["begins", "lasts", "over", "event"]


@dataclass(frozen=True)
class Alert:
    kind: str
    text: str
    state: State
    since: float  # wall clock


@dataclass(frozen=True)
class Seen:
    """What the agent knows at one moment; times are wall clock."""

    node: str
    peer: str
    status: Mapping[str, Any] | None  # the gateway's, None while it doesn't answer
    etcd_ok: bool
    maintained: Mapping[str, float]  # nodes that are being worked on, since when
    quarantined: int  # files in quarantine on this node
    expires: float | None  # when this node's certificate ends
    started: float  # since when this agent watches
    took_over: float | None = None  # when this node last took over without having been asked to

    @property
    def peer_expected_away(self) -> bool:
        """The other node is being worked on; unless it served meanwhile, and this node had to take over from it."""
        since = self.maintained.get(self.peer)
        return since is not None and not (self.took_over is not None and self.took_over > since)

    @property
    def silenced(self) -> bool:
        """What happens here is the work's doing, unless this is the node that serves."""
        return self.node in self.maintained and (self.status is None or self.status["role"] != "primary")


def conditions(seen: Seen, settings: AlertSettings, now: float) -> dict[str, tuple[str, str]]:
    """What is not as it should be: key -> (kind, text)."""
    found: dict[str, tuple[str, str]] = {}
    for node, since in seen.maintained.items():
        if now - since > MAINTENANCE_S:
            text = f"node {node} is under maintenance for {_span(now - since)}; `tandem maintenance off` ends it"
            found[f"maintenance {node}"] = ("maintenance", text)
    if seen.silenced:
        return found
    if not seen.etcd_ok:
        found["quorum"] = ("no quorum", f"node {seen.node} doesn't reach a quorum of etcd; nobody could take over")
    if seen.quarantined > settings.quarantine_files:
        found["quarantine"] = ("quarantine grows", f"{seen.quarantined} files in quarantine on node {seen.node}")
    if seen.expires is not None and seen.expires - now < EXPIRES_SOON_S:
        days = max(0, int((seen.expires - now) / 86400))
        found["certificate"] = ("certificate ends", f"the certificate of node {seen.node} ends in {days} days")
    if seen.status is None:
        found["gateway"] = ("gateway away", f"the gateway of node {seen.node} doesn't answer")
        return found
    return found | _of_status(seen, seen.status, settings, now)


def _of_status(
    seen: Seen, status: Mapping[str, Any], settings: AlertSettings, now: float
) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    node = seen.node
    if status["mode"] == "SOLO" and not seen.peer_expected_away:
        count = status["single_copy"]
        found["solo"] = ("solo", f"node {node} works alone; {count} objects have one copy only")
    if status["trouble"]:
        found["trouble"] = ("trouble", f"node {node}: {status['trouble']}")
    for name, state in status.get("follow", {}).items():
        if state.startswith("failing"):
            found[f"follows {name}"] = ("follower fails", f"node {node}: {name} is {state}")
    for alarm in status["alarms"]:
        found[f"alarm {alarm}"] = ("address", f"node {node}: {alarm}")
    for link in status["links"]:
        if not link["up"] and len(status["links"]) > 1 and not seen.peer_expected_away:
            found[f"link {link['route']}"] = ("link down", f"no answer between the nodes over {link['route']}")
    if status["healing"]["unreadable"]:
        count = status["healing"]["unreadable"]
        found["unreadable"] = ("unreadable", f"{count} objects have no good copy on either node")
    if status.get("conflicts"):
        text = f"{status['conflicts']} studies name more than one patient; `tandem conflicts` lists them"
        found["conflicts"] = ("conflict", text)
    volumes = status["nodes"][node]["volumes"]
    for volume in volumes:
        if str(volume["state"]).startswith(BAD_STATES):
            found[f"disk {volume['path']}"] = ("disk out", f"node {node}: {volume['path']} is {volume['state']}")
    total, free = (sum(volume.get(key, 0) for volume in volumes) for key in ("total", "free"))
    if total and 100 * free / total < settings.free_percent:
        found["space"] = ("low space", f"node {node} has {100 * free / total:.0f} % free")
    if status["role"] == "primary":
        for aet, longest_s in settings.silent_s.items():
            silent_s = now - max(status["heard"].get(aet, 0.0), seen.started)
            if silent_s > longest_s:
                found[f"silent {aet}"] = ("silent modality", f"nothing from {aet} for {_span(silent_s)}")
    return found


def _span(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


@dataclass
class Watch:
    """Remembers what was told."""

    settings: AlertSettings
    _since: dict[str, float] = field(default_factory=dict)  # when a condition began to hold
    _told: dict[str, tuple[float, str, str]] = field(default_factory=dict)  # when, kind, text
    _gone: dict[str, float] = field(default_factory=dict)  # when a told condition was first not seen
    _primary: str = ""
    _bad: int | None = None

    def look(self, seen: Seen, now: float, wall: float) -> list[Alert]:
        """What to tell now. `now`: seconds that only grow."""
        found = conditions(seen, self.settings, wall)
        if seen.silenced:
            self._forget(key for key in self._since if key not in found)
        elif seen.peer_expected_away:
            self._forget(key for key in self._since if key.startswith("link ") and key not in found)
        found = self._unknown(seen) | found
        alerts = self._events(seen, wall)
        for key, (kind, text) in found.items():
            self._gone.pop(key, None)
            since = self._since.setdefault(key, now)
            told = self._told.get(key)
            due = now - since >= self.settings.settle_s if told is None else now - told[0] >= self.settings.again_s
            if due:
                alerts.append(Alert(kind, text, "lasts" if told else "begins", wall - (now - since)))
                self._told[key] = (now, kind, text)
        for key in [key for key in self._since if key not in found]:
            if key not in self._told:
                del self._since[key]
            elif now - self._gone.setdefault(key, now) >= self.settings.settle_s:
                _, kind, text = self._told.pop(key)
                over = _again(seen) if kind == "solo" else text
                alerts.append(Alert("in sync again" if kind == "solo" else kind, over, "over", wall))
                del self._since[key], self._gone[key]
        return alerts

    def _forget(self, keys: Iterable[str]) -> None:
        """What was told before the work began isn't over with it; afterwards it begins anew."""
        for key in list(keys):
            for known in (self._since, self._told, self._gone):
                known.pop(key, None)

    def _unknown(self, seen: Seen) -> dict[str, tuple[str, str]]:
        """What was told and can't be seen now: that isn't its end."""
        status = seen.status
        told = {key: (kind, text) for key, (_, kind, text) in self._told.items()}
        if status is None:
            return {key: what for key, what in told.items() if not key.startswith(OWN)}
        whole = len(status["in_sync"]) > 1
        return {} if whole or "solo" not in told else {"solo": told["solo"]}

    def _events(self, seen: Seen, wall: float) -> list[Alert]:
        status = seen.status
        if status is None:
            return []
        alerts: list[Alert] = []
        primary = str(status["primary"])
        if primary and primary != self._primary:
            # The new primary tells, so that it is told once.
            if self._primary and primary == seen.node and not seen.peer_expected_away:
                text = f"node {primary} serves instead of {self._primary}"
                alerts.append(Alert("failover", text, "event", wall))
            self._primary = primary
        bad = int(status["scrub"]["bad"])
        if self._bad is not None and bad > self._bad:
            text = f"scrubbing found {bad - self._bad} bad copies on node {seen.node}; they are made again"
            alerts.append(Alert("scrub repair", text, "event", wall))
        self._bad = bad
        return [] if seen.silenced else alerts


def _again(seen: Seen) -> str:
    single = seen.status["single_copy"] if seen.status else 0
    return "the nodes are in sync again" + (f"; {single} objects are still to be copied" if single else "")
