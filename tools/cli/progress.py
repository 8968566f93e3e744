"""Progress of long work, on standard error, where that is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


@contextmanager
def of(label: str) -> Iterator[Callable[[int, int], None]]:
    """`progress(done, of)`, both counts."""
    with _bar() as bar:
        task = bar.add_task(label, total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=min(done, total), total=max(1, total))

        yield progress


@contextmanager
def counting(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """`progress(more)`: so many more are done, of `total` if that is known."""
    with _bar() as bar:
        task = bar.add_task(label, total=total)
        yield lambda more: bar.advance(task, more)
