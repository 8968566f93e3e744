"""What people run on a pair to be sure of it, and what it tells them by itself."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import wait_for
from tests.system.conftest import heal, other_than, primary_of
from tests.system.test_switchover import asked, tandem
from tests.system.writer import Writer
from tools.lab.pair import Lab


def told(lab: Lab, node: str, since: int) -> list[tuple[str, str]]:
    """(kind, state) of the alerts of a node after the first `since`."""
    return [(alert["kind"], alert["state"]) for alert in lab.alerts(node)[since:]]


def test_drill_goes_there_and_back(lab: Lab) -> None:
    primary = primary_of(lab)
    assert tandem(lab, primary, "drill")[0] == 1  # nobody said yes
    code, output = tandem(lab, primary, "drill", "--yes", "--goal", "100", "--json")
    assert code == 0, output
    result = json.loads(output)
    assert [(leg["from"], leg["to"]) for leg in result["legs"]] == [
        (primary, other_than(primary)),
        (other_than(primary), primary),
    ]
    for leg in result["legs"]:
        assert 0 < leg["outage_s"] < 100
        assert {"fence_s", "roll_forward_s", "share_s", "address_s"} <= leg["parts"].keys()
    assert primary_of(lab) == primary


def test_no_drill_where_it_would_do_harm(lab: Lab) -> None:
    primary = primary_of(lab)
    lab.power_off(other_than(primary))
    wait_for(lambda: (lab.node_status(primary) or {}).get("mode") == "SOLO", "the primary to go on alone")
    code, output = tandem(lab, primary, "drill", "--yes")
    assert (code, "in sync" in output) == (4, True), output


def test_alerts_tell_of_a_takeover_and_of_its_end(lab: Lab) -> None:
    primary = primary_of(lab)
    other = other_than(primary)
    before = len(lab.alerts(other))
    with Writer(lab) as writer:
        lab.power_off(primary)
        writer.wait_for_more(20)
        wait_for(lambda: {("failover", "event"), ("solo", "begins")} <= set(told(lab, other, before)), "both alerts")
    heal(lab)
    wait_for(lambda: ("in sync again", "over") in told(lab, other, before), "the end to be told")
    text = next(alert["text"] for alert in lab.alerts(other)[before:] if alert["kind"] == "failover")
    assert text == f"node {other} serves instead of {primary}"
    row = asked(lab, other, "history")[1]["history"][-1]
    assert (row["primary"], row["before"], row["by"]) == (other, primary, "takeover")
    wanted = {"detect_s", "fence_s", "roll_forward_s", "share_s", "address_s", "first_success_s"}
    wait_for(lambda: wanted <= asked(lab, other, "history")[1]["history"][-1]["parts"].keys(), "each part")
    writer.check()


def test_maintenance_hands_over_and_silences(lab: Lab) -> None:
    node = primary_of(lab)
    other = other_than(node)
    before = len(lab.alerts(other))
    code, output = tandem(lab, node, "maintenance", "on")
    assert code == 0, output
    assert primary_of(lab) == other
    assert tandem(lab, other, "maintenance", "on")[0] == 4  # one at a time
    code, result = asked(lab, node, "why")
    assert [row["condition"] for row in result["conditions"] if not row["ok"]] == ["no maintenance"]
    lab.power_off(node)
    wait_for(lambda: (lab.node_status(other) or {}).get("mode") == "SOLO", "the other to go on alone")
    time.sleep(8)  # longer than an alert needs to settle
    lab.power_on(node)
    wait_for(lab.in_sync, "the pair to be in sync", 120)
    assert tandem(lab, node, "maintenance", "off")[0] == 0
    assert not [kind for kind, _ in told(lab, other, before)]
    assert primary_of(lab) == other


@pytest.mark.soak
def test_the_only_node_serves_also_under_maintenance(lab: Lab) -> None:
    """Maintenance is a wish, not a lock: nobody else being there, the node takes over after a while."""
    node = primary_of(lab)
    other = other_than(node)
    assert tandem(lab, node, "maintenance", "on")[0] == 0
    try:
        lab.power_off(other)
        wait_for(lambda: lab.primary() == node, "it to serve after all", 120)
    finally:
        assert tandem(lab, node, "maintenance", "off")[0] == 0


def test_status_is_watched(lab: Lab) -> None:
    argv, environment = lab.command("a", [sys.executable, "-m", "tools", "status", "--watch", "--json"])
    watching = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert watching.stdout
        seen = [json.loads(watching.stdout.readline()) for _ in range(3)]
    finally:
        watching.send_signal(signal.SIGINT)
        watching.wait(30)
    assert [status["node"] for status in seen] == ["a"] * 3
    assert watching.returncode == 0


def test_a_share_that_keeps_ending_hands_over(lab: Lab) -> None:
    primary = primary_of(lab)
    deadline = time.monotonic() + 150
    while lab.primary() == primary and time.monotonic() < deadline:
        try:
            lab.kill(primary, "smbd")
        except Exception:  # it isn't up again yet
            time.sleep(0.1)
        time.sleep(0.3)
    assert primary_of(lab) == other_than(primary)
    status = lab.node_status(primary)
    assert status
    assert status["trouble"] == "smbd doesn't stay up"
    lab.power_off(primary)  # its agent forgets
    heal(lab)
