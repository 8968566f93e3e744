"""The status document of a node, for `tandem status` and monitoring. No patient data in it."""

from typing import Any

import msgspec

from storage.engine import Engine
from storage.replication.state_transfer import StateTaker
from storage.state.model import Put


def mode(engine: Engine) -> str:
    """PAIR, HELD, SOLO, STANDALONE as primary; SYNC, CATCHUP, RECOVERING as the other; READONLY without authority."""
    core, peer = engine.core, engine.core.peer
    if core.leading:
        if peer is None:
            return "STANDALONE"
        if not engine.duty.serving:
            return "PROMOTING"
        if not engine.may_serve:
            return "READONLY"
        if peer not in core.in_sync.required:
            return "SOLO"
        return "PAIR" if core.joined and core.in_sync.confirmed == core.in_sync.required else "HELD"
    if core.joined and core.whole_at is not None:
        return "SYNC" if core.whole and core.durable >= core.whole_at else "CATCHUP"
    return "RECOVERING"


def node_status(engine: Engine) -> dict[str, Any]:
    core, settings = engine.core, engine.settings
    counts = engine.catalogue.counts()
    own = {"role": "primary" if core.leading else "standby", "volumes": engine.volumes.status(), **counts}
    nodes: dict[str, Any] = {core.node: {**own, "epoch": core.promised, "seq": core.last[1]}}
    if core.peer:
        nodes[core.peer] = _peer(engine)
    behind = max(0, core.commit - core.peer_acked) if core.leading and core.peer else 0
    single = _single_copy(engine, counts["instances"])
    in_sync = sorted(core.in_sync.confirmed) if core.leading else sorted(engine.told.members)
    return {
        "cluster": settings.cluster.name if settings.cluster else "",
        "node": core.node,
        "role": "primary" if core.leading else "standby",
        "mode": mode(engine),
        "epoch": core.epoch if core.leading else core.promised,
        "primary": core.node if core.leading else engine.told.primary,
        "in_sync": in_sync,
        "vips": list(engine.told.vips),
        "share": engine.told.share,
        "follow": engine.told.follow,
        "etcd": engine.told.etcd_ok,
        "heard": dict(engine.journal.heard),
        "trouble": engine.told.trouble or _foreign(engine) or _outdated(engine),
        "alarms": list(engine.told.alarms),
        "peer_version": engine.peering.routes.peer_version,
        "links": engine.peering.routes.status(),
        "nodes": nodes,
        **counts,
        "single_copy": single,
        "single_copy_since": _oldest_single(engine) if single else None,
        "store_id": core.store_id,
        "incarnation": core.incarnation,
        "whole": core.whole,
        "lineage": core.lineage,
        "foreign": core.peer_foreign,
        "catch_up": {
            "behind": behind,
            "linked": core.linked,
            "missing": counts["missing"],
            "state": _taking(engine.state_taker),
        },
        "healing": {
            "missing": counts["missing"],
            "unreadable": len(engine.healing.unreadable),
            **_pace(engine, counts["missing"]),
        },
        "scrub": {"at": engine.scrub.at, "checked": engine.scrub.checked, "bad": engine.scrub.bad},
        "files": _files(engine),
        "commit": core.commit,
    }


def _files(engine: Engine) -> dict[str, int]:
    """Of the share: how many there are, how many are being written to, how many one of the nodes lacks; how many are to
    be looked at, are DICOM instances, and of these have their instance elsewhere, too."""
    rows = {"count": "file_inodes", "dirty": "file_dirty", "single_copy": "file_lacking"}
    rows |= {"unlooked": "file_unlooked", "images": "file_images", "doubles": "file_doubles"}
    with engine.catalogue.kv.read() as txn:
        return {name: txn.count(table) for name, table in rows.items()}


def _taking(taker: StateTaker) -> dict[str, Any] | None:
    """How far the other node's state was taken, or why it wasn't."""
    if taker.rows is None and not taker.why_not:
        return None
    rows, of = taker.rows or (0, 0)
    return {"rows": rows, "of": of, "why_not": taker.why_not}


def _pace(engine: Engine, missing: int) -> dict[str, Any]:
    """Copies made again a second, and how many seconds are left at that pace."""
    rate = engine.healing.rate
    left = missing / rate if rate else None
    return {"rate": round(rate, 1), "seconds_left": left if left is None else round(left)}


def _peer_leads(engine: Engine) -> bool:
    hello = engine.core.peer_hello
    return hello is not None and (hello.leading or engine.core.joined)


def _peer(engine: Engine) -> dict[str, Any]:
    core = engine.core
    info: dict[str, Any] = msgspec.msgpack.decode(core.peer_info) if core.peer_info and core.linked else {}
    info = {key: value for key, value in info.items() if key not in ("room", "usable")}
    role = "standby" if core.leading else "primary" if _peer_leads(engine) else "unknown"
    seq = core.peer_last[1] if core.peer_last else None
    return {"role": role if core.linked else "away", "seq": seq, "volumes": [], **info}


def _known_of_peer(engine: Engine) -> int:
    """Up to which entry the other node's present store is known to hold everything."""
    hello = engine.core.peer_hello
    same = hello is None or hello.store_id == engine.pair_with
    return max(engine.core.peer_acked if engine.core.leading else 0, engine.pair_seq if same else 0)


def _oldest_single(engine: Engine) -> float | None:
    """When the oldest object with one copy was received, wall clock; None where it is an older one that was lost."""
    core = engine.core
    first = 1 if core.peer is None else _known_of_peer(engine) + 1
    for entry in engine.catalogue.entries(first, 100):
        if isinstance(entry.operation, Put):
            return entry.operation.received
    return None


def _single_copy(engine: Engine, instances: int) -> int:
    """Objects whose only copy is here, by copies: what the other node's store lacks by its own word, and what it hasn't
    acknowledged."""
    core = engine.core
    if core.peer is None:
        return instances
    in_sync = core.peer in core.in_sync.confirmed if core.leading else core.joined
    unsent = 0 if in_sync else max(0, core.commit - _known_of_peer(engine))
    return min(instances, unsent + engine.peer_missing)


def _outdated(engine: Engine) -> str:
    """The other node wouldn't understand the log."""
    core = engine.core
    if core.peer_hello is None or core.peer_hello.features >= core.needs_features:
        return ""
    return f"node {core.peer} runs a version that doesn't know the share's files, and can't follow: upgrade it"


def _foreign(engine: Engine) -> str:
    """Two logs that are never matched: one of them has to go."""
    core = engine.core
    if not core.peer_foreign:
        return ""
    return (
        f"node {core.peer} holds another log than this one; on the node whose data are to go to quarantine: stop it, "
        "`tandem rebuild-index --from peer`"
    )
