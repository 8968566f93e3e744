"""`tools/simulate`: many seeds, several processes."""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import click

from tests.simulation import mutants, store_mutants, store_world, world
from tests.simulation.gateway import SimGateway
from tests.simulation.world import Violation

CORE_MUTANTS = {mutant.__name__: mutant for mutant in mutants.MUTANTS}
STORE_MUTANTS = store_mutants.MUTANTS
WORLDS = ("core", "store")


def one(seed: int, kind: str = "core", mutant: str = "") -> tuple[int, str, int]:
    """(seed, what broke or "", changes acknowledged)."""
    try:
        if kind == "core":
            result = world.run(seed, CORE_MUTANTS[mutant] if mutant else SimGateway)
        else:
            with STORE_MUTANTS[mutant]() if mutant else contextlib.nullcontext():
                result = store_world.run(seed)
    except Violation as violation:
        return seed, str(violation), 0
    except Exception as error:  # the world itself broke: no less a finding
        return seed, f"{type(error).__name__}: {error}", 0
    return seed, "", int(result["acknowledged"])


def _quiet() -> None:
    """Processes that die in the world leave coroutines behind that nobody awaits any more."""
    os.nice(5)  # the machine may have a lab to run as well
    warnings.simplefilter("ignore", RuntimeWarning)
    sys.unraisablehook = lambda _: None


def many(
    seeds: Iterable[int], jobs: int, kind: str = "core", mutant: str = "", at_once: int = 10
) -> Iterator[tuple[int, str, int]]:
    """What `one` says of each. `at_once`: how many a process is given at a time."""
    with ProcessPoolExecutor(jobs, initializer=_quiet) as pool:
        try:
            yield from pool.map(partial(one, kind=kind, mutant=mutant), seeds, chunksize=at_once)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # whoever has seen enough waits for no more


@click.command()
@click.option("--seeds", default=100, show_default=True, help="How many.")
@click.option("--start", default=0, show_default=True, help="The first.")
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option("--world", "kind", type=click.Choice(WORLDS), default="store", show_default=True, help="What is run.")
@click.option("--mutant", type=click.Choice([*CORE_MUTANTS, *STORE_MUTANTS]), help="Run with a deliberate bug.")
def main(seeds: int, start: int, jobs: int, kind: str, mutant: str | None) -> None:
    """Drive a pair through faults from seeds, in virtual time, and check that its promises hold.

    World `core`: replication and HA cores with late, lost, repeated and reordered messages. World `store`: the whole
    store of both nodes on disks that lose what wasn't synced, fail, fill up and flip bits.
    """
    if mutant and mutant not in (CORE_MUTANTS if kind == "core" else STORE_MUTANTS):
        raise click.UsageError(f"{mutant} isn't a bug of world {kind}")
    began, acknowledged, bad = time.monotonic(), 0, 0
    with click.progressbar(length=seeds, label="seeds", file=sys.stderr) as bar:
        for seed, why, count in many(range(start, start + seeds), jobs, kind, mutant or ""):
            bar.update(1)
            acknowledged += count
            if why:
                bad += 1
                again = f"tools/simulate --world {kind} --seeds 1 --start {seed}"
                again += f" --mutant {mutant}" if mutant else ""
                click.echo(f"seed {seed}: {why[:300]}\n    replay: {again}")
    seconds = time.monotonic() - began
    click.echo(f"{seeds} seeds from {start}: {bad} failed; {acknowledged} acknowledged changes; {seconds:.0f} s")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
