"""The rights that the systemd units leave to the processes are enough. Without systemd, setpriv takes the others."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, wait_for
from tests.system.conftest import heal, other_than, pid_of
from tests.system.writer import Writer
from tools.lab.network import NODES, VIP
from tools.lab.pair import Lab

UNITS = ROOT / "conf" / "systemd"


def capabilities(unit: str) -> str:
    """As setpriv(1) wants them."""
    lines = (UNITS / f"{unit}.service").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("CapabilityBoundingSet=")]
    names = line.partition("=")[2].lower().split()
    return ",".join(["-all", *(f"+{name.removeprefix('cap_')}" for name in names)])


@pytest.fixture
def confined(lab: Lab) -> Iterator[Lab]:
    """Gateways and agents with the capabilities of their units, and no way to more."""
    kept = {node: lab.node_dir(node) / "processes.json" for node in NODES}
    texts = {node: path.read_text() for node, path in kept.items()}

    def restart_all() -> None:
        for node in NODES:
            lab.power_off(node)
        for node in NODES:
            lab.power_on(node)
        heal(lab)

    for node, path in kept.items():
        commands = json.loads(texts[node])
        for name in ("gateway", "ha"):
            rights = capabilities(f"tandem-{name}")
            commands[name] = ["setpriv", f"--bounding-set={rights}", *commands[name]]
        path.write_text(json.dumps(commands))
    restart_all()
    yield lab
    for node, path in kept.items():
        path.write_text(texts[node])
    restart_all()


def test_rights_of_the_units_are_enough(confined: Lab) -> None:
    """For storing, for the share, for a takeover, and for a disk that dies and is replaced."""
    lab = confined
    node = str(wait_for(lab.primary, "a primary"))
    process = Path(f"/proc/{pid_of(lab, node)}/status").read_text()
    assert "CapEff:\t0000000000000400\n" in process  # CAP_NET_BIND_SERVICE and nothing else
    with Writer(lab) as writer:
        writer.wait_for_more(10)
        lab.power_off(node)
        writer.wait_for_more(10)
        lab.power_on(node)
        heal(lab)
        lab.disks(other_than(node)).fail(1)
        writer.wait_for_more(10)
        heal(lab)
    writer.check()
    assert lab.primary() == other_than(node)
    words = ["smbclient", "-N", "-U%", f"//{VIP}/archive", "-c", "recurse; ls"]
    argv, environment = lab.command("client", words)
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
    listed = done.stdout
    assert done.returncode == 0, listed + done.stderr
    assert sum(line.split()[0] in {f"{uid}.dcm" for uid in writer.acknowledged} for line in listed.splitlines() if line)
