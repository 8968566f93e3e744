"""`tandem init` and `tandem renew`: the files of a new cluster, and new certificates for one that runs.

Both work in a folder of their own, on any machine; what they write is carried to the nodes. The folder holds the key of
the cluster's authority: who has it can make members, so it is kept away from the nodes.
"""

import ipaddress
import json
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from conf.settings import SettingsError, build, load
from tools.cli.certificates import Authority, expires
from tools.cli.exits import EXIT_CONFIG
from tools.cli.options import Failure, json_option

ETC: Final = Path("/etc/tandem")
DATA: Final = Path("/srv/tandem")


@dataclass(frozen=True)
class Machine:
    name: str
    address: str
    private: str = ""  # its address in the network that only the two nodes have

    @property
    def addresses(self) -> list[str]:
        return [self.address, *([self.private] if self.private else [])]

    def url(self, port: int) -> str:
        return f"https://[{self.address}]:{port}" if ":" in self.address else f"https://{self.address}:{port}"


def _machine(_: click.Context, __: click.Parameter, value: Any) -> Any:
    """NAME=ADDRESS[,PRIVATE ADDRESS], once or several times."""

    def read(text: str) -> Machine:
        name, _, addresses = text.partition("=")
        address, _, private = addresses.partition(",")
        try:
            ipaddress.ip_address(address)
            if private:
                ipaddress.ip_address(private)
        except ValueError:
            raise click.BadParameter(f"{text}: expected NAME=ADDRESS, a=10.0.0.1 for instance") from None
        return Machine(name, address, private)

    return tuple(read(one) for one in value) if isinstance(value, tuple) else read(value)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--node",
    "nodes",
    multiple=True,
    required=True,
    callback=_machine,
    metavar="NAME=ADDRESS[,PRIVATE]",
    help="Twice: a storage node, and its address in a network that only the nodes have, if there is one.",
)
@click.option("--witness", required=True, callback=_machine, metavar="NAME=ADDRESS", help="Has etcd's third vote.")
@click.option(
    "--vip", "vips", multiple=True, required=True, metavar="ADDRESS/PREFIX", help="For modalities and viewers."
)
@click.option("--read-vip", "read_vips", multiple=True, metavar="ADDRESS/PREFIX", help="For reading, on the standby.")
@click.option("--volume", "volumes", multiple=True, type=click.Path(path_type=Path), help="One for each disk.")
@click.option("--name", default="tandem", show_default=True, help="Of the cluster.")
@click.option("--aet", default="TANDEM", show_default=True, help="AE title.")
@click.option("--share", is_flag=True, help="Show the archive over SMB, to users that Samba knows; see [share].")
@json_option
def init(
    folder: Path,
    nodes: Sequence[Machine],
    witness: Machine,
    vips: Sequence[str],
    read_vips: Sequence[str],
    volumes: Sequence[Path],
    name: str,
    aet: str,
    share: bool,
    as_json: bool,
) -> None:
    """Write the settings, etcd's environment and the certificates of a new cluster below FOLDER, one folder for each
    machine, to be copied to its /etc/tandem.

    tandem init cluster --node a=10.0.0.1,192.168.9.1 --node b=10.0.0.2,192.168.9.2 --witness w=10.0.0.3
    --vip 10.0.0.100/24 --volume /srv/tandem/disk1
    """
    machines = (*nodes, witness)
    if len(nodes) != 2:
        raise Failure("a cluster has two nodes: give --node twice", EXIT_CONFIG)
    if len({machine.name for machine in machines}) < 3 or len({machine.address for machine in machines}) < 3:
        raise Failure("the three machines need three names and three addresses", EXIT_CONFIG)
    if bool(nodes[0].private) != bool(nodes[1].private):
        raise Failure("a private address for both nodes, or for none", EXIT_CONFIG)
    volumes = volumes or (DATA / "disk1",)
    texts = {
        (own.name, "node.toml"): _settings(own, peer, machines, vips, read_vips, volumes, name, aet, share)
        for own, peer in (nodes, nodes[::-1])
    }
    authority = Authority(folder / "authority")
    try:
        for (node, _), text in texts.items():
            build(tomllib.loads(text), f"node {node}")
        authority.make(name)
        for machine in machines:
            home = folder / machine.name
            authority.issue(home / "tls", machine.name, machine.addresses)
            texts[machine.name, "etcd.env"] = _etcd_environment(machine, machines, name)
            home.chmod(0o755)
        for (machine_name, file), text in texts.items():
            (folder / machine_name / file).write_text(text)
            (folder / machine_name / file).chmod(0o644)  # whatever the umask; no secret is in it
    except FileExistsError:
        raise Failure(f"{folder} holds a cluster already; `tandem renew` makes new certificates", EXIT_CONFIG) from None
    except (OSError, SettingsError) as error:
        raise Failure(str(error), EXIT_CONFIG) from None
    result = {"folder": str(folder), "machines": [machine.name for machine in machines]}
    text = "\n".join(f"{folder / machine.name}/*  ->  {ETC} on {machine.address}" for machine in machines)
    text += f"\n{authority.folder}: keep it safe, and not on the nodes; `tandem renew {folder}` needs it"
    click.echo(json.dumps(result) if as_json else text)


def _settings(
    own: Machine,
    peer: Machine,
    machines: Sequence[Machine],
    vips: Sequence[str],
    read_vips: Sequence[str],
    volumes: Sequence[Path],
    name: str,
    aet: str,
    share: bool,
) -> str:
    """node.toml; whatever isn't in it has its default. See conf/node.toml for all keys."""
    endpoints = [machine.url(2379) for machine in sorted(machines, key=lambda one: one != own)]
    addresses = [json.dumps(vip) for vip in vips]
    addresses += [f'{{ address = "{vip}", prefer = "standby" }}' for vip in read_vips]
    first, second = (own.private, peer.private) if own.private else (own.address, peer.address)
    links = f'links = [{{ address = "{own.address}", peer_address = "{peer.address}" }}]\n' if own.private else ""
    return (
        f"# Node {own.name} of cluster {name}, written by `tandem init`. All keys: conf/node.toml.\n\n"
        f'[node]\nname = "{own.name}"\n\n[dicom]\naet = "{aet}"\n\n'
        f"[storage]\nvolumes = {json.dumps([str(volume) for volume in volumes])}\n\n"
        f'[cluster]\nname = "{name}"\naddress = "{first}"\npeer = "{peer.name}"\npeer_address = "{second}"\n{links}'
        f"etcd = {json.dumps(endpoints)}\nvips = [{', '.join(addresses)}]\n"
        f'tls = {{ ca_file = "{ETC}/tls/ca.crt", certificate = "{ETC}/tls/node.crt", key = "{ETC}/tls/node.key" }}\n\n'
        f"[share]\nenabled = {json.dumps(share)}\n\n[http]\nport = 8080\n"
    )


def _etcd_environment(own: Machine, machines: Sequence[Machine], name: str) -> str:
    client, peer = own.url(2379), own.url(2380)
    tls = {"TRUSTED_CA_FILE": "ca.crt", "CERT_FILE": "node.crt", "KEY_FILE": "node.key"}
    variables = {
        "NAME": own.name,
        "DATA_DIR": "/var/lib/etcd/tandem",
        "LISTEN_CLIENT_URLS": client,
        "ADVERTISE_CLIENT_URLS": client,
        "LISTEN_PEER_URLS": peer,
        "INITIAL_ADVERTISE_PEER_URLS": peer,
        "INITIAL_CLUSTER": ",".join(f"{machine.name}={machine.url(2380)}" for machine in machines),
        "INITIAL_CLUSTER_TOKEN": f"tandem-{name}",
        "HEARTBEAT_INTERVAL": "100",
        "ELECTION_TIMEOUT": "1000",
        "AUTO_COMPACTION_RETENTION": "1h",
        "CLIENT_CERT_AUTH": "true",
        "PEER_CLIENT_CERT_AUTH": "true",
        **{f"{prefix}{key}": f"{ETC}/tls/{file}" for prefix in ("", "PEER_") for key, file in tls.items()},
    }
    return "".join(f"ETCD_{key}={value}\n" for key, value in variables.items())


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@json_option
def renew(folder: Path, as_json: bool) -> None:
    """Make new certificates for the machines of the cluster in FOLDER. Copied to the nodes they are used for every new
    connection; nothing is restarted."""
    authority = Authority(folder / "authority")
    made = {}
    try:
        for home in sorted(path.parent for path in folder.glob("*/etcd.env")):
            addresses = _addresses(home)
            authority.issue(home / "tls", home.name, addresses)
            made[home.name] = expires(home / "tls" / "node.crt").date().isoformat()
    except (OSError, ValueError) as error:
        raise Failure(f"{folder}: {error}", EXIT_CONFIG) from None
    if not made:
        raise Failure(f"{folder}: no cluster of `tandem init` in it", EXIT_CONFIG)
    text = "\n".join(f"{folder / name}/tls/*  ->  {ETC}/tls/; good until {until}" for name, until in made.items())
    click.echo(json.dumps({"until": made}) if as_json else text)


def _addresses(home: Path) -> list[str]:
    """By which a machine is reached: from etcd's environment and, on a node, its settings."""
    lines = dict(line.split("=", 1) for line in (home / "etcd.env").read_text().splitlines() if "=" in line)
    found = [lines["ETCD_LISTEN_PEER_URLS"].removeprefix("https://").rpartition(":")[0].strip("[]")]
    if (home / "node.toml").exists():
        cluster = load(home / "node.toml", os.environ).cluster
        found += [route.address for route in cluster.routes if route.address not in found] if cluster else []
    return found


COMMANDS: tuple[click.Command, ...] = (init, renew)
