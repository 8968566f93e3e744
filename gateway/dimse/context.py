"""What the services of an association work with; made once, in `server.py`."""

from concurrent.futures import Executor
from dataclasses import dataclass

from conf.settings import DicomSettings
from gateway.archive.converting import Converter
from gateway.archive.destinations import Destinations
from gateway.archive.jobs import Jobs
from gateway.dimse.commitments import Commitments
from storage.store import Store


@dataclass(frozen=True)
class Context:
    store: Store
    settings: DicomSettings
    executor: Executor  # for queries, which block
    converter: Converter
    jobs: Jobs
    destinations: Destinations
    commitments: Commitments
