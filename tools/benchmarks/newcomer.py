"""`tools/bench newcomer`: an empty node joins a pair that has an archive of many instances.

The instances are synthetic, rows without files: what is measured is when new images are protected again, not how long
it takes to copy the old ones (`tools/bench heal`).
"""

import json
import shutil
import statistics
import threading
import time
from pathlib import Path
from typing import Final

import click

from storage.objects.local_volume import read_marker
from storage.state.catalogue import Catalogue
from storage.state.model import Entry
from tools.benchmarks.start import MAP_BYTES, fill, synthetic
from tools.benchmarks.store import sample
from tools.benchmarks.upkeep import pair, send, status_of
from tools.lab.pair import Lab, wait_for

WAIT_S: Final = 3600.0


def enlarge(lab: Lab, node: str, instances: int) -> None:
    """Make the archive of a node that is off so much larger."""
    catalogue = Catalogue.open(lab.node_dir(node) / "state" / "catalogue", MAP_BYTES)
    volume = str(read_marker(lab.volumes(node)[0])["id"])
    epoch, last = catalogue.epochs.last
    rows = (
        (Entry(epoch, last + entry.seq, entry.operation), location) for entry, location in synthetic(volume, instances)
    )
    fill(catalogue, rows, instances, {})
    catalogue.close()


def newcomer(instances: int, folder: Path | None, as_json: bool) -> None:
    """An empty node joins: how long until new images are protected again, and what senders notice meanwhile."""
    with pair(folder, 1) as lab:
        item = sample("CT")
        send(item, range(10))
        stays = str(lab.primary())
        joins = "b" if stays == "a" else "a"
        lab.power_off(joins)
        wait_for("the other node to work alone", lambda: status_of(lab, stays).get("mode") == "SOLO", WAIT_S)
        lab.power_off(stays)
        lab.disks(stays).mount()
        enlarge(lab, stays, instances)
        shutil.rmtree(lab.node_dir(joins) / "images")
        for point in (*lab.volumes(joins), lab.node_dir(joins) / "state"):
            point.mkdir(exist_ok=True)
        lab.disks(joins).create(1)
        lab.power_on(stays)
        wait_for("it to serve", lambda: lab.primary() == stays, WAIT_S)
        alone = statistics.median(send(item, range(100, 200)))
        times: list[float] = []
        ended = threading.Event()

        def keep_sending() -> None:
            for number in range(1000, 1 << 30, 10):
                if ended.is_set():
                    return
                times.extend(send(item, range(number, number + 10)))

        sender = threading.Thread(target=keep_sending)
        lab.power_on(joins)
        begin = time.perf_counter()
        sender.start()
        try:
            wait_for("the link", lambda: status_of(lab, joins).get("catch_up", {}).get("linked", False), WAIT_S, 0.05)
            linked = time.perf_counter()
            wait_for("the pair to be in sync", lab.in_sync, WAIT_S, 0.05)
            synced = time.perf_counter()
        finally:
            ended.set()
            sender.join()
        found = {
            "instances": instances,
            "linked after, s": linked - begin,
            "in sync after, s": synced - begin,
            "C-STORE alone, ms": alone,
            "C-STORE meanwhile, ms": statistics.median(times),
            "longest, ms": max(times),
        }
    click.echo(
        json.dumps(found) if as_json else "\n".join(f"{name:<24} {value:>10.1f}" for name, value in found.items())
    )
