"""The settings of one node: a frozen model, read from one TOML file and overridden from the environment.

A wrong file is refused in one line that says where, what was expected and the nearest known key, because the
person who reads it is standing in front of a node that doesn't start.
"""

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

ENV_PREFIX = "TANDEM__"

AETitle = Annotated[str, Field(min_length=1, max_length=16, pattern=r"^[\x21-\x5b\x5d-\x7e]([\x20-\x5b\x5d-\x7e]*)$")]
ShareName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]
Port = Annotated[int, Field(ge=1, le=65535)]
FolderPath = Annotated[Path, Field(strict=False)]
SharedFolder = Annotated[str, Field(pattern=r"^/")]  # of the share's files, from their topmost folder
Seconds = Annotated[float, Field(gt=0)]


class SettingsError(Exception):
    """One line for the operator: file, key, what was expected."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class NodeSettings(Section):
    name: str = Field("standalone", pattern=r"^[a-z0-9][a-z0-9-]{0,30}$", description="Name of this node")
    run_dir: FolderPath = Field(Path("/run/tandem"), description="Sockets and other short-lived files")


class Destination(Section):
    host: str = Field(description="Name or address")
    port: Port = Field(description="TCP port")
    timeout_s: Seconds = Field(30.0, description="For connecting, and for each answer")
    associations: int = Field(1, ge=1, le=16, description="At once, for one C-MOVE")
    tls: bool = Field(False, description="Connect with TLS; the certificate is checked")
    ca_file: FolderPath | None = Field(None, description="Whose certificates are trusted; default: the system's")
    certificate: FolderPath | None = Field(None, description="Our certificate, where one is asked for")
    key: FolderPath | None = Field(None, description="Its key")


class DicomSettings(Section):
    aet: AETitle = Field("TANDEM", description="Application Entity title we answer to")
    bind: str = Field("", description="Address to listen on; empty: all, IPv4 and IPv6")
    port: Port = Field(11112, description="TCP port")
    max_pdu_bytes: int = Field(131072, ge=4096, le=1 << 20, description="Maximum PDU length that we accept")
    max_associations: int = Field(64, ge=1, description="Established associations at once")
    max_associations_per_address: int = Field(16, ge=1, description="Of these, from one address")
    storing_reserve: int = Field(8, ge=0, description="Of these, kept for those who propose storage only")
    max_connections: int = Field(256, ge=1, description="TCP connections at once, with or without an association")
    max_connections_per_address: int = Field(64, ge=1, description="Of these, from one address")
    max_object_bytes: int = Field(16 << 30, ge=1 << 20, description="An object larger than this is refused")
    retrieve_memory_bytes: int = Field(256 << 20, ge=16 << 20, description="Of objects on their way out, all together")
    artim_timeout_s: Seconds = Field(30.0, description="From TCP connect to a complete A-ASSOCIATE-RQ (PS3.8 9.1.5)")
    idle_timeout_s: Seconds = Field(600.0, description="Longest pause between two messages of an association")
    message_timeout_s: Seconds = Field(60.0, description="Longest time for one message, plus its size / minimum rate")
    minimum_rate_bytes_s: int = Field(65536, ge=1, description="A message slower than this is cut")
    require_called_aet: bool = Field(False, description="Reject associations that call another AE title")
    calling_aets: tuple[AETitle, ...] = Field((), strict=False, description="Calling AE titles let in; empty: all")
    any_sop_class: bool = Field(False, description="Also store SOP classes that are not known (private ones)")
    any_transfer_syntax: bool = Field(
        False, description="Also store in transfer syntaxes that are not known, as explicit VR little endian"
    )
    query_limit: int = Field(20000, ge=1, description="C-FIND answers at most before 0xA700")
    query_search_s: float = Field(5.0, gt=0, description="C-FIND searches so long without an answer before 0xA700")
    query_processes: int = Field(0, ge=0, le=64, description="That answer queries; 0: one for two cores")
    keep_heads: bool = Field(True, description="Keep what stands before the pixels, for queries; else files are read")
    relational_queries: bool = Field(
        True, description="Let queries leave out unique keys above their level without having negotiated it"
    )
    lenient_uids: bool = Field(False, description="Also store what isn't a UID to the letter: letters, 128 characters")
    move_from: str = Field("", description="Address that C-MOVE comes from; default: the system's choice")
    name_matching: Literal["exact", "folded", "fuzzy"] = Field(
        "folded", description="Person names: as they are, without regard to case and accents, or word by word"
    )
    default_character_set: str = Field("", description="Specific Character Set of data sets that name none")
    response_character_set: Literal["utf-8", "stored"] = Field("utf-8", description="Of C-FIND answers")
    users: dict[str, str] = Field({}, description="User identity: name -> `tandem hash-password`; empty: all may")
    standby_reads: bool = Field(True, description="Let the standby answer queries and retrieves on its own address")
    isolated_reads: bool = Field(False, description="Let a node that hears neither etcd nor its peer answer them too")
    destinations: dict[AETitle, Destination] = Field({}, description="Whom we send to: C-MOVE, commitment reports")
    commitment_wait_s: Seconds = Field(3600.0, description="How long a commitment waits for the second copy")
    report_days: float = Field(7.0, gt=0, description="How long a commitment report is tried again")


class StorageSettings(Section):
    state: FolderPath = Field(Path("/var/lib/tandem"), description="Catalogue (LMDB)")
    log: FolderPath | None = Field(None, description="Log, on a disk of its own perhaps; default: log below state")
    log_bytes: int = Field(1 << 30, ge=32 << 20, description="Room that the log takes on its disk")
    volumes: tuple[FolderPath, ...] = Field((), strict=False, description="Directories, one on each disk")
    reserve_bytes: int = Field(256 << 20, ge=0, description="Space kept free on each volume")
    map_size_bytes: int = Field(64 << 30, ge=1 << 20, description="Largest size of the LMDB file (sparse)")
    duplicates: Literal["replace-same-source", "replace", "refuse"] = Field(
        "replace-same-source", description="Other bytes under a stored SOP Instance UID: who may replace what is stored"
    )
    slow_io_s: Seconds = Field(5.0, description="A disk that takes longer for one object is avoided for a while")
    hang_s: Seconds = Field(
        5.0, description="A disk that doesn't answer for so long is left, and what goes to it with it"
    )
    reprotect_after_s: Seconds = Field(
        600.0, description="A volume that is absent, or doesn't answer, is written off after this"
    )
    scrub_days: float = Field(30.0, ge=0, description="Check every copy against its digest in so many days; 0: never")
    verify_tail: bool = Field(True, description="Check entries since the last checkpoint against their bytes at start")

    @property
    def log_folder(self) -> Path:
        return self.log or self.state / "log"


class VirtualAddress(Section):
    address: str = Field(description="With prefix: 10.0.0.5/24, fd00::5/64")
    prefer: Literal["primary", "standby"] = Field(
        "primary", description="standby: for reading, on the primary only while there is no complete standby"
    )
    interface: str = Field("", description="Default: the interface that is in the address's subnet")

    @field_validator("address")
    @classmethod
    def _is_address_with_prefix(cls, value: str) -> str:
        ipaddress.ip_interface(value)
        if "/" not in value:
            raise ValueError("expected an address with its prefix, 10.0.0.5/24")
        return value

    @property
    def ip(self) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface:
        return ipaddress.ip_interface(self.address)


class LinkSettings(Section):
    address: str = Field(description="This node's address in another network between the nodes")
    peer_address: str = Field(description="The other node's address there")


class TlsSettings(Section):
    ca_file: FolderPath = Field(description="The cluster's own authority: whom it signed may take part")
    certificate: FolderPath = Field(description="This node's certificate; its name is the node's")
    key: FolderPath = Field(description="Its key")


class FollowSettings(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$", description="What it is called in status and alerts")
    unit: str = Field("", description="A systemd unit, not enabled there; or start")
    start: tuple[str, ...] = Field((), strict=False, description="A program that stays in the foreground")
    stop: tuple[str, ...] = Field((), strict=False, description="How it is asked to end; empty: SIGTERM")
    check: tuple[str, ...] = Field((), strict=False, description="Ends with 0 if it is well; empty: it is if it runs")
    user: str = Field("", description="As whom start is run; empty: root")
    files: bool = Field(True, description="It needs the share's files: started once they are mounted")
    start_s: Seconds = Field(60.0, description="It is well within this, or its start has failed")
    stop_s: Seconds = Field(20.0, description="It has ended within this, or it is killed")
    check_s: Seconds = Field(10.0, description="A check that takes longer has failed")
    check_every_s: Seconds = Field(5.0, description="How often it is checked")
    on_failure: Literal["restart", "hand-over", "alert"] = Field(
        "restart", description="restart: and hand over after too many; hand-over: at once; alert: only tell"
    )
    restarts: int = Field(3, ge=0, le=1000, description="More failures than this in ten minutes are too many")

    @model_validator(mode="after")
    def _is_one_kind(self) -> "FollowSettings":
        if bool(self.unit) == bool(self.start):
            raise ValueError("give either unit or start")
        if self.unit and (self.stop or self.user):
            raise ValueError("stop and user are the unit's own business")
        return self


class ClusterSettings(Section):
    name: str = Field("tandem", pattern=r"^[a-z0-9][a-z0-9-]{0,30}$", description="Name below /tandem/ in etcd")
    address: str = Field(description="This node's own address")
    peer: str = Field(description="Name of the other node")
    peer_address: str = Field(description="Address of the other node")
    replication_port: Port = Field(11200, description="TCP port of the stream between the nodes")
    etcd: tuple[str, ...] = Field(strict=False, min_length=1, description="etcd endpoints, http://host:port")
    lease_ttl_s: float = Field(3.0, ge=1.0, description="The leader's lease; a lost node is noticed after this")
    peer_timeout_s: Seconds = Field(1.5, description="Silence of the peer before the in-sync set is shrunk")
    ack_timeout_s: Seconds = Field(10.0, description="A linked peer that doesn't acknowledge is dropped after this")
    gateway_grace_s: Seconds = Field(5.0, description="A gateway that can't serve this long hands the lease over")
    degraded: Literal["solo", "refuse"] = Field("solo", description="What to do with one copy only")
    vips: tuple[VirtualAddress, ...] = Field((), strict=False, description="Virtual addresses, 10.0.0.5/24 or a table")
    links: tuple[LinkSettings, ...] = Field((), strict=False, description="Further networks between the nodes")
    tls: TlsSettings | None = Field(None, description="Between the nodes, and to etcd where its URLs say https")
    watchdog: str = Field("", description="Watchdog device, /dev/watchdog: resets a primary that can't renew its lease")
    state_after: int = Field(
        20_000, ge=0, description="A node that is more entries of the log behind takes the other one's state"
    )
    follow: tuple[FollowSettings, ...] = Field((), strict=False, description="What runs where the primary is, in order")
    gateway_starts: int = Field(5, ge=1, description="A gateway that starts more often in a minute isn't trusted")

    @field_validator("vips", mode="before")
    @classmethod
    def _address_alone_is_enough(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return [{"address": vip} if isinstance(vip, str) else vip for vip in value]

    @field_validator("follow")
    @classmethod
    def _names_differ(cls, value: tuple[FollowSettings, ...]) -> tuple[FollowSettings, ...]:
        if len({one.name for one in value}) < len(value):
            raise ValueError("two of them have one name")
        return value

    @property
    def routes(self) -> tuple[LinkSettings, ...]:
        """All networks between the nodes, the preferred one first."""
        return (LinkSettings(address=self.address, peer_address=self.peer_address), *self.links)


class HttpSettings(Section):
    bind: str = Field(
        "", description="Address to listen on; empty: [cluster] address and links, else 127.0.0.1; *: all"
    )
    port: int = Field(0, ge=0, le=65535, description="TCP port of health and metrics; 0: none")


class AlertSettings(Section):
    command: tuple[str, ...] = Field((), strict=False, description="Run for each alert, which it reads as JSON")
    webhook: str = Field("", description="URL to which each alert is posted as JSON")
    mail_to: tuple[str, ...] = Field((), strict=False, description="Addresses that each alert is mailed to")
    mail_from: str = Field("tandem@localhost", description="Sender of these mails")
    smtp: str = Field("localhost:25", description="Mail server, host:port")
    settle_s: Seconds = Field(
        10.0, description="A condition must hold so long before it is told, and before its end is"
    )
    again_s: Seconds = Field(3600.0, description="Told again after this while it lasts")
    free_percent: float = Field(
        10.0, ge=0, le=100, description="Low space: less free than this on all volumes together"
    )
    quarantine_files: int = Field(1000, ge=1, description="More files than this in quarantine")
    silent_s: dict[AETitle, float] = Field({}, description="Modalities and the longest usual time between their images")

    @property
    def any(self) -> bool:
        return bool(self.command or self.webhook or self.mail_to)


class ShareSettings(Section):
    enabled: bool = Field(False, description="Run smbd where the virtual address is")
    name: ShareName = Field("archive", description="Name of the share that shows the archive, read-only")
    files: str = Field(
        "", pattern=r"^[A-Za-z0-9_-]{0,40}$", description="Name of the read-write share, files say; empty: none"
    )
    inbox: str = Field(
        "inbox", pattern=r"^[A-Za-z0-9_-]{0,40}$", description="Folder of files that is taken in, and share"
    )
    index: tuple[SharedFolder, ...] = Field(
        ("/",), strict=False, description="Folders of the files whose DICOM files are in the catalogue where they lie"
    )
    index_not: tuple[SharedFolder, ...] = Field((), strict=False, description="Folders below these that aren't")
    mount: FolderPath = Field(Path("/srv/tandem-files"), description="Where `tandem mount` shows the files")
    port: Port = Field(445, description="TCP port of SMB")
    netbios_name: str = Field("TANDEM", pattern=r"^[A-Z0-9-]{1,15}$", description="Server name shown to clients")
    guest: bool = Field(False, description="Let everybody read the archive; false: only users of the share")
    hosts_allow: tuple[str, ...] = Field((), strict=False, description="Networks let in, 10.0.0.0/24; empty: all")
    folder: FolderPath = Field(Path("/var/lib/tandem-share"), description="smbd's own files: users, locks, logs")
    first_uid: int = Field(70_000, ge=1000, le=2**31, description="Of the accounts made for the share's users")
    signing: Literal["auto", "required"] = Field("auto", description="Of SMB messages: if the client asks, or always")
    encryption: Literal["off", "desired", "required"] = Field("desired", description="Of SMB, where the client can")
    acls: Literal["posix", "windows"] = Field(
        "posix", description="Each user may do everything, or permissions as Windows sets them"
    )
    recycle: bool = Field(False, description="What is deleted over SMB goes to .recycle/USER first")
    audit: bool = Field(False, description="Log who opens, makes, renames and deletes what over SMB")
    macos: bool = Field(False, description="What macOS asks of a share (vfs_fruit)")

    @property
    def takes_in(self) -> str:
        """Name of the inbox, "" if there is none: it is a folder of the files."""
        return self.inbox if self.files else ""

    @model_validator(mode="after")
    def _shares_differ(self) -> "ShareSettings":
        names = [name.lower() for name in (self.name, self.files, self.inbox) if name]
        if self.guest and self.encryption == "required":
            raise ValueError("share.guest lets in who can't encrypt: not with encryption = required")
        if len(set(names)) < len(names):
            raise ValueError("share.name, share.files and share.inbox are three shares: give them three names")
        return self


class LogSettings(Section):
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe lines shown")
    format: Literal["json", "text"] = Field("json", description="One JSON object a line, or text for people")


class Settings(Section):
    node: NodeSettings = NodeSettings()
    dicom: DicomSettings = DicomSettings()
    storage: StorageSettings = StorageSettings()
    cluster: ClusterSettings | None = None
    share: ShareSettings = ShareSettings()
    http: HttpSettings = HttpSettings()
    alerts: AlertSettings = AlertSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _peer_is_another(self) -> "Settings":
        if self.cluster and self.cluster.peer == self.node.name:
            raise ValueError("cluster.peer names this node itself")
        for one in self.cluster.follow if self.cluster else ():
            if one.files and not (self.share.enabled and self.share.files):
                raise ValueError(
                    f"cluster.follow {one.name} needs the share's files; say files = false, or share.files"
                )
        return self

    @property
    def files_socket(self) -> Path:
        """Unix socket on which the process that serves the share has its changes logged."""
        return self.node.run_dir / f"{self.node.name}-files.sock"

    @property
    def control_socket(self) -> Path:
        """Unix socket on which the gateway takes its role and answers `status`."""
        return self.node.run_dir / f"{self.node.name}.sock"


def load(path: Path, env: Mapping[str, str] = os.environ) -> Settings:
    """Read `path` (TOML), apply `TANDEM__SECTION__KEY` overrides; raises SettingsError with one line."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error
    return build(overridden(raw, env), str(path))


def build(raw: dict[str, Any], source: str) -> Settings:
    """Check `raw` against the model; `source` is named in the error."""
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(f"{source}: {_explain(error)}") from None


def overridden(raw: dict[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """`raw` with the environment's overrides. Values are read as TOML values, else taken as text."""
    result = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in raw.items()}
    for variable, text in env.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        section, _, key = variable[len(ENV_PREFIX) :].lower().partition("__")
        if not key:
            raise SettingsError(f"{variable}: expected {ENV_PREFIX}SECTION__KEY")
        part = result.setdefault(section, {})
        if isinstance(part, dict):
            part[key] = _toml_value(text)
    return result


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    key = ".".join(where) or "(file)"
    if first["type"] == "extra_forbidden":
        known = _known_keys(where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{key}: unknown key; {hint}"
    if first["type"] == "missing":
        return f"{key}: missing; expected a value here"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if isinstance(given, dict) else f", got {given!r}"
    return f"{key}: {message[0].lower()}{message[1:]}{shown}"


def _known_keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            return []
        options = [field.annotation, *get_args(field.annotation)]
        nested = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
