"""`tools/simulate`: many seeds, several processes."""

import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import click

from tests.simulation.gateway import SimGateway
from tests.simulation.mutants import MUTANTS
from tests.simulation.world import Violation, run

MUTANT_NAMES = {mutant.__name__: mutant for mutant in MUTANTS}


def one(seed: int, mutant: str = "") -> tuple[int, str, int]:
    """(seed, what broke or "", entries acknowledged)."""
    try:
        result = run(seed, MUTANT_NAMES[mutant] if mutant else SimGateway)
    except Violation as violation:
        return seed, str(violation), 0
    return seed, "", int(result["acknowledged"])


def many(seeds: Iterable[int], jobs: int, mutant: str = "") -> Iterator[tuple[int, str, int]]:
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(partial(one, mutant=mutant), seeds, chunksize=10)


@click.command()
@click.option("--seeds", default=100, show_default=True, help="How many.")
@click.option("--start", default=0, show_default=True, help="The first.")
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option("--mutant", type=click.Choice(list(MUTANT_NAMES)), help="Run with a deliberate bug.")
def main(seeds: int, start: int, jobs: int, mutant: str | None) -> None:
    """Drive the pair's cores through crashes, cuts, pauses, lost and reordered messages, from seeds."""
    began, acknowledged, bad = time.monotonic(), 0, 0
    with click.progressbar(length=seeds, label="seeds", file=sys.stderr) as bar:
        for seed, why, count in many(range(start, start + seeds), jobs, mutant or ""):
            bar.update(1)
            acknowledged += count
            if why:
                bad += 1
                again = f"tools/simulate --seeds 1 --start {seed}" + (f" --mutant {mutant}" if mutant else "")
                click.echo(f"seed {seed}: {why}\n    replay: {again}")
    seconds = time.monotonic() - began
    click.echo(f"{seeds} seeds from {start}: {bad} failed; {acknowledged} acknowledged changes; {seconds:.0f} s")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
