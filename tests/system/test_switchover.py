"""What people may have the pair do: switch over, pause, force; and what they can ask it."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from tests.conftest import wait_for
from tests.system.conftest import heal, other_than, primary_of
from tests.system.writer import Writer
from tools.lab.network import ADDRESSES, inside
from tools.lab.pair import HTTP_PORT, Lab
from tools.lab.samples import archived, sop_instance


def tandem(lab: Lab, node: str, *words: str) -> tuple[int, str]:
    """(exit code, output) of a command on a node."""
    argv, environment = lab.command(node, [sys.executable, "-m", "tools", *words])
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def asked(lab: Lab, node: str, *words: str) -> tuple[int, Any]:
    code, output = tandem(lab, node, *words, "--json")
    return code, json.loads(output)


def health(address: str, path: str) -> int:
    with inside("client"):
        try:
            with urllib.request.urlopen(f"http://{address}:{HTTP_PORT}{path}", timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


def test_switchover_that_cannot_be(lab: Lab) -> None:
    primary = primary_of(lab)
    other = other_than(primary)
    assert tandem(lab, primary, "switchover", "--to", "nobody")[0] == 2
    lab.power_off(other)
    wait_for(lambda: (lab.node_status(primary) or {}).get("mode") == "SOLO", "the primary to go on alone")
    code, output = tandem(lab, primary, "switchover")
    assert (code, "isn't in sync" in output) == (4, True), output
    assert primary_of(lab) == primary


def test_paused_pair_takes_over_only_after_resume(lab: Lab) -> None:
    primary = primary_of(lab)
    other = other_than(primary)
    assert tandem(lab, primary, "pause")[0] == 0
    try:
        lab.power_off(primary)
        for _ in range(100):  # longer than two leases
            assert lab.primary() != other
            time.sleep(0.15)
        code, result = asked(lab, other, "why")
        assert code == 4
        assert [row["condition"] for row in result["conditions"] if not row["ok"]] == ["not paused"]
    finally:
        assert tandem(lab, other, "resume")[0] == 0
    wait_for(lambda: lab.primary() == other, "the other node to take over")
    code, result = asked(lab, "a" if other == "a" else "b", "history")
    assert result["history"][-1]["by"] == "takeover"


def test_health_tells_who_serves(lab: Lab) -> None:
    primary = primary_of(lab)
    first, second = ADDRESSES[primary], ADDRESSES[other_than(primary)]

    def shown(address: str) -> list[int]:
        return [health(address, f"/health/{kind}") for kind in ("live", "ready", "primary", "standby")]

    wait_for(lambda: shown(first) == [200, 200, 200, 503], "what the primary says")
    wait_for(lambda: shown(second) == [200, 200, 503, 200], "what the standby says")  # a moment ago it heard nothing
    wait_for(lambda: health(second, "/health/standby?lag=100000") == 200, "a standby that isn't far behind")
    assert health(second, "/health/standby?lag=x") == 400
    with inside("client"), urllib.request.urlopen(f"http://{first}:{HTTP_PORT}/metrics", timeout=30) as answer:
        metrics = answer.read().decode()
    assert "tandem_primary 1.0" in metrics
    assert "tandem_in_sync 2.0" in metrics


def test_forced_failover_says_what_it_costs(lab: Lab) -> None:
    primary = primary_of(lab)
    stale = other_than(primary)
    assert tandem(lab, primary, "failover", "--force", "--yes")[0] == 4  # there is a primary
    with Writer(lab) as writer:
        lab.power_off(stale)
        writer.wait_for_more(20)
        code, result = asked(lab, primary, "risk")
        assert code == 4
        assert result["single_copy"] > 0
    lab.power_off(primary)
    lab.power_on(stale)
    wait_for(lambda: (lab.node_status(stale) or {}).get("etcd"), "the stale node to see etcd")
    wait_for(lambda: asked(lab, stale, "why")[0] == 4, "it to say what blocks")
    blocked = [row["condition"] for row in asked(lab, stale, "why")[1]["conditions"] if not row["ok"]]
    assert "in sync" in blocked
    wait_for(lambda: tandem(lab, stale, "failover", "--force", "--yes")[0] == 0, "the force to be applied")
    wait_for(lambda: lab.primary() == stale, "the stale node to serve")
    argv = [sys.executable, "-m", "tools", "rebuild-index", "--from", "peer", "--config", str(lab.config(primary))]
    lab.disks(primary).mount()
    subprocess.run(argv, check=True, capture_output=True)
    lab.disks(primary).unmount()
    lab.power_on(primary)
    heal(lab)
    acknowledged = set(writer.acknowledged)

    def kept() -> bool:
        lab.order(primary, "scrub")  # sets aside what the catalogue doesn't name now
        return acknowledged <= archived(lab.volumes(primary)).keys() | _quarantined(lab, primary)

    wait_for(kept, "what it alone held to be in its quarantine", 120)
    assert _quarantined(lab, primary) & acknowledged


def _quarantined(lab: Lab, node: str) -> set[str]:
    files = (path for volume in lab.volumes(node) for path in (volume / "quarantine").glob("*.dcm"))
    whole = (path for path in files if path.read_bytes()[128:132] == b"DICM")  # others were cut short by the power
    return {sop_instance(path) for path in whole}
