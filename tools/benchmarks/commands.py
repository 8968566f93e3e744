"""`tools/bench ...`: the benchmarks' command line."""

from pathlib import Path

import click

from tools.benchmarks import failover as bench_failover
from tools.benchmarks import newcomer as bench_newcomer
from tools.benchmarks import share as bench_share
from tools.benchmarks import upkeep as bench_upkeep
from tools.benchmarks.floor import floor
from tools.benchmarks.log import log
from tools.benchmarks.query import query
from tools.benchmarks.retrieve import retrieve
from tools.benchmarks.start import start
from tools.benchmarks.store import store


@click.group()
def main() -> None:
    """Benchmarks: beside what people use, in the same lab, and beside plain `cp`."""


main.add_command(store)
main.add_command(log)
main.add_command(floor)
main.add_command(start)
main.add_command(query)
main.add_command(retrieve)
where = click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where all data lie; default: a tmpfs.")
for run, count in ((bench_upkeep.heal, 600), (bench_upkeep.scrub, 600), (bench_upkeep.rebuild, 4000)):
    command = click.command(run.__name__, help=run.__doc__)(run)
    main.add_command(where(click.option("--count", default=count, show_default=True, help="Objects.")(command)))

newcomer = click.command("newcomer", help=bench_newcomer.newcomer.__doc__)(bench_newcomer.newcomer)
newcomer = click.option("--json", "as_json", is_flag=True, help="One JSON object.")(newcomer)
main.add_command(
    where(click.option("--instances", default=100_000, show_default=True, help="Of the archive.")(newcomer))
)

share = click.command("share", help=bench_share.share.__doc__)(bench_share.share)
share = click.option("--json", "as_json", is_flag=True, help="One JSON object.")(share)
share = click.option("--gluster", is_flag=True, help="GlusterFS as well; needs Debian's glusterfs-server.")(share)
main.add_command(where(click.option("--count", default=100, show_default=True, help="Of each operation.")(share)))

runs_option = click.option("--runs", default=5, show_default=True, help="Of each kind of fault.")
failover = click.command("failover", help=bench_failover.failover.__doc__)(bench_failover.failover)
who_option = click.option(
    "--who",
    type=click.Choice(["tandem", "ctdb", "both"]),
    default="tandem",
    show_default=True,
    help="Whom to measure; CTDB needs Debian's packages ctdb and ethtool.",
)
main.add_command(where(who_option(runs_option(failover))))

if __name__ == "__main__":
    main()
