"""What the services of an association work with; made once, in `server.py`."""

from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from conf.settings import DicomSettings
from gateway.archive.budget import Budget
from gateway.archive.converting import Converter
from gateway.archive.destinations import Destinations
from gateway.archive.jobs import Jobs
from gateway.archive.live import Live
from gateway.archive.queries import Queries
from gateway.dimse.commitments import Commitments
from gateway.metrics import Meter
from gateway.workers.pool import Pool
from storage.store import Store


@dataclass(frozen=True)
class Context:
    store: Store
    live: Live
    executor: Executor  # for what blocks: identifiers, and rows of what is to be retrieved
    queries: Queries
    readers: Pool  # processes that read odd data sets
    converter: Converter
    memory: Budget  # bytes of objects on their way out
    jobs: Jobs
    destinations: Destinations
    commitments: Commitments
    meter: Meter
    spawn: Callable[[Coroutine[Any, Any, None]], None]

    @property
    def settings(self) -> DicomSettings:
        """Those in force now."""
        return self.live.dicom
