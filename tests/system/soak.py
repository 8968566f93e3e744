"""`tools/soak`: faults in random order from a seed, on real processes and disks, under a writer that never stops."""

import contextlib
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click

from storage.control_client import OrderFailed
from storage.crash import POINTS
from tests.conftest import wait_for
from tests.system.conftest import DISK_MB, NODES, REPLICATION_PORT, TTL_S, VOLUMES, heal, other_than, primary_of
from tests.system.writer import Writer
from tools.lab.network import LabError
from tools.lab.pair import Lab


def are_same(lab: Lab) -> bool:
    try:
        return bool(lab.order(primary_of(lab), "verify")["same"])
    except (OrderFailed, OSError):  # the link has just gone; it comes back
        return False


def faults(lab: Lab, rng: random.Random) -> dict[str, Callable[[str], None]]:
    """name -> what is done to a node. Each mends itself or is mended by `heal`."""

    def pause() -> None:
        time.sleep(rng.uniform(0.2, 4.0))

    def power(node: str) -> None:
        lab.power_off(node)
        pause()
        lab.power_on(node)

    def power_both(node: str) -> None:
        lab.power_off(node)
        lab.power_off(other_than(node))
        lab.power_on(other_than(node))
        pause()
        lab.power_on(node)

    def freeze(node: str) -> None:
        lab.freeze(node)
        pause()
        lab.thaw(node)

    def cut_all(node: str) -> None:
        lab.cut(node, "all")
        pause()
        lab.join(node, "all")

    def cut_link(node: str) -> None:
        lab.cut_port(node, REPLICATION_PORT)
        pause()
        lab.join_port(node, REPLICATION_PORT)

    def cut_answers(node: str) -> None:
        lab.cut_one_way(node, REPLICATION_PORT)
        pause()
        lab.join_port(node, REPLICATION_PORT)

    def fill(node: str) -> None:
        number = rng.randint(1, VOLUMES)
        lab.disks(node).fill(number)
        pause()
        lab.disks(node).empty(number)

    def slow(node: str) -> None:
        lab.slow(node, rng.choice([8, 16, 40]))
        pause()
        lab.slow(node, 0)

    def crash(node: str) -> None:
        lab.order(node, "crash", point=rng.choice(POINTS), count=rng.randint(1, 20))

    return {
        "power off": power,
        "power off, both": power_both,
        "freeze": freeze,
        "cut from all": cut_all,
        "cut replication link": cut_link,
        "acknowledgements lost": cut_answers,
        "kill gateway": lambda node: lab.kill(node, "gateway"),
        "kill ha": lambda node: lab.kill(node, "ha"),
        "kill etcd": lambda node: lab.kill(node, "etcd"),
        "slow line": slow,
        "disk full": fill,
        "disk hangs": lambda node: lab.disks(node).stall(rng.randint(1, VOLUMES), rng.uniform(0.5, 15.0)),
        "disk dies": lambda node: lab.disks(node).fail(rng.randint(1, VOLUMES)),
        "crash point": crash,
    }


@click.command()
@click.option("--minutes", default=5.0, show_default=True, help="How long.")
@click.option("--seed", default=1, show_default=True, help="Which faults, and in which order.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), default="/dev/shm", show_default=True)
def main(minutes: float, seed: int, folder: Path) -> None:
    """Everything acknowledged must be on both nodes afterwards, with its digest; exit 1 if not."""
    rng, done, problems = random.Random(seed), Counter[str](), []
    base = Path(tempfile.mkdtemp(prefix="tandem-soak-", dir=folder))
    lab = Lab(base)
    acknowledged = 0
    try:
        lab.up(TTL_S, VOLUMES, DISK_MB)
        end = time.monotonic() + minutes * 60
        possible = faults(lab, rng)
        with click.progressbar(length=int(minutes * 60), label=f"seed {seed}", file=sys.stderr) as bar:
            while time.monotonic() < end:
                with Writer(lab) as writer:
                    writer.wait_for_more(10)
                    name = rng.choice(list(possible))
                    node = rng.choice(NODES)
                    with contextlib.suppress(LabError, OrderFailed, OSError):
                        possible[name](node)
                    done[name] += 1
                    writer.wait_for_more(10)
                heal(lab)
                try:
                    # A disk that died unnoticed is found by this, and its copies are made again, the oldest first.
                    wait_for(lambda: are_same(lab), "both nodes to be the same", 300)
                    writer.check()
                except AssertionError as error:
                    problems.append(f"{name} on {node}: {error}")
                acknowledged += len(writer.acknowledged)
                bar.update(max(0, int(minutes * 60 - (end - time.monotonic())) - bar.pos))
    finally:
        lab.down(keep_data=False)
        shutil.rmtree(base, ignore_errors=True)
    for name, count in sorted(done.items()):
        bad = sum(problem.startswith(name) for problem in problems)
        click.echo(f"{name:<24} {count:>4} times   {'ok' if not bad else f'{bad} BAD'}")
    click.echo(f"{acknowledged} acknowledged, {len(problems)} problems")
    for problem in problems:
        click.echo(f"   {problem}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
