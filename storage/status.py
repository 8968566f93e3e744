"""The status document of a node, for `tandem status` and monitoring. No patient data in it."""

from typing import TYPE_CHECKING, Any

import msgspec

from storage.model import Put

if TYPE_CHECKING:
    from storage.store import Store


def mode(store: "Store") -> str:
    """PAIR, HELD, SOLO, STANDALONE as primary; SYNC, CATCHUP, RECOVERING as the other; READONLY without authority."""
    core, peer = store.core, store.core.peer
    if core.leading:
        if peer is None:
            return "STANDALONE"
        if not store.duty.serving:
            return "PROMOTING"
        if not store.may_serve:
            return "READONLY"
        if peer not in core.required:
            return "SOLO"
        return "PAIR" if core.joined and core.confirmed == core.required else "HELD"
    if core.joined and core.whole_at is not None:
        return "SYNC" if core.whole and core.durable >= core.whole_at else "CATCHUP"
    return "RECOVERING"


def node_status(store: "Store") -> dict[str, Any]:
    core, settings = store.core, store.settings
    counts = store.catalogue.counts()
    own = {"role": "primary" if core.leading else "standby", "volumes": store.volumes.status(), **counts}
    nodes: dict[str, Any] = {core.node: {**own, "epoch": core.promised, "seq": core.last[1]}}
    if core.peer:
        nodes[core.peer] = _peer(store)
    behind = max(0, core.commit - core.peer_acked) if core.leading and core.peer else 0
    single = _single_copy(store)
    in_sync = sorted(core.confirmed) if core.leading else sorted(store.told.members)
    return {
        "cluster": settings.cluster.name if settings.cluster else "",
        "node": core.node,
        "role": "primary" if core.leading else "standby",
        "mode": mode(store),
        "epoch": core.epoch if core.leading else core.promised,
        "primary": core.node if core.leading else store.told.primary,
        "in_sync": in_sync,
        "vips": list(store.told.vips),
        "share": store.told.share,
        "etcd": store.told.etcd_ok,
        "heard": dict(store.journal.heard),
        "trouble": store.told.trouble,
        "alarms": list(store.told.alarms),
        "peer_version": store.peering.routes.peer_version,
        "links": store.peering.routes.status(),
        "nodes": nodes,
        **counts,
        "single_copy": single,
        "single_copy_since": _oldest_single(store) if single else None,
        "store_id": core.store_id,
        "incarnation": core.incarnation,
        "whole": core.whole,
        "catch_up": {"behind": behind, "linked": core.linked, "missing": counts["missing"]},
        "healing": {
            "missing": counts["missing"],
            "unreadable": store.healing.unreadable,
            **_pace(store, counts["missing"]),
        },
        "scrub": {"at": store.scrub.at, "checked": store.scrub.checked, "bad": store.scrub.bad},
        "commit": core.commit,
    }


def _pace(store: "Store", missing: int) -> dict[str, Any]:
    """Copies made again a second, and how many seconds are left at that pace."""
    rate = store.healing.rate
    left = missing / rate if rate else None
    return {"rate": round(rate, 1), "seconds_left": left if left is None else round(left)}


def _peer_leads(store: "Store") -> bool:
    hello = store.core.peer_hello
    return hello is not None and (hello.leading or store.core.joined)


def _peer(store: "Store") -> dict[str, Any]:
    core = store.core
    info: dict[str, Any] = msgspec.msgpack.decode(core.peer_info) if core.peer_info and core.linked else {}
    info = {key: value for key, value in info.items() if key not in ("room", "usable")}
    role = "standby" if core.leading else "primary" if _peer_leads(store) else "unknown"
    seq = core.peer_last[1] if core.peer_last else None
    return {"role": role if core.linked else "away", "seq": seq, "volumes": [], **info}


def _oldest_single(store: "Store") -> float | None:
    """When the oldest object with one copy was received, wall clock."""
    core = store.core
    first = 1 if core.peer is None else max(core.peer_acked, store.pair_seq) + 1
    for entry in store.catalogue.entries(first, 100):
        if isinstance(entry.operation, Put):
            return entry.operation.received
    return None


def _single_copy(store: "Store") -> int:
    """Committed objects that only this node is known to hold."""
    core = store.core
    if core.peer is None:
        return core.commit
    if not core.leading:
        return 0
    return 0 if core.peer in core.confirmed else max(0, core.commit - max(core.peer_acked, store.pair_seq))
