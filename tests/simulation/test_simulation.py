"""The seeded simulation: many seeds hold, and each deliberate bug is found."""

import pytest

from tests.simulation.mutants import MUTANTS
from tests.simulation.run import many

SEEDS = 1000
MUTANT_SEEDS = 300


@pytest.mark.timeout(600)
def test_invariants_hold() -> None:
    failures = [f"seed {seed}: {why}" for seed, why, _ in many(range(SEEDS), 2) if why]
    assert not failures, "\n".join(failures[:5])


def test_seeds_do_something() -> None:
    assert all(acknowledged > 20 for _, _, acknowledged in many(range(8), 2))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", [mutant.__name__ for mutant in MUTANTS])
def test_checker_sees_deliberate_bugs(mutant: str) -> None:
    found = (why for _, why, _ in many(range(MUTANT_SEEDS), 2, mutant) if why)
    assert next(found, None), f"{mutant} wasn't noticed within {MUTANT_SEEDS} seeds"
