"""Independent software that the tests talk to: started, asked, ended."""

import json
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydicom import Dataset
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification

from tests.conftest import ROOT, free_port, wait_for

HOST = "127.0.0.1"
NODE_MODULES = ROOT / ".venv" / "node" / "node_modules"


def run(*arguments: object, check: bool = True, timeout_s: float = 120) -> str:
    """Standard output and error of a command."""
    done = subprocess.run(
        [str(argument) for argument in arguments], capture_output=True, timeout=timeout_s, check=False
    )
    output = (done.stdout + done.stderr).decode("utf-8", "replace")
    if check and done.returncode:
        raise AssertionError(f"{arguments[0]} ended with {done.returncode}:\n{output[-3000:]}")
    return output


def gdcm(*arguments: object) -> str:
    """GDCM's client, telling all it does. Debian's 3.0.21 aborts in a destructor once the association is released,
    whoever the server is (DCMTK's as well): that isn't held against it, anything else is."""
    output = run("gdcmscu", "-D", *arguments, check=False)
    assert "ProtocolStream as nullptr" in output or "what():" not in output, output
    return output


def dcmjs(port: int, operation: str, *arguments: object, calling: str = "DCMJS") -> dict[str, Any]:
    """One operation of the JavaScript client."""
    done = subprocess.run(
        ["node", str(Path(__file__).parent / "dimse.js"), HOST, str(port), calling, operation, *map(str, arguments)],
        capture_output=True,
        timeout=120,
        env={"NODE_PATH": str(NODE_MODULES), "PATH": "/usr/bin:/bin:/usr/local/bin"},
        check=False,
    )
    assert done.stdout, done.stderr.decode()[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    return found


class Scp:
    """A pynetdicom application that takes what is stored and the reports of commitments."""

    def __init__(self, aet: str, port: int = 0, host: str = HOST) -> None:
        self.aet, self.port, self.host = aet, port or free_port(), host
        self.stored: dict[str, bytes] = {}
        self.syntaxes: dict[str, str] = {}
        self.originators: list[tuple[str, int]] = []
        self.reports: list[tuple[int, Dataset]] = []
        self.status = 0x0000
        self.before: Any = None
        self._ae = AE(aet)
        self._server: Any = None
        self._tls: ssl.SSLContext | None = None

    def takes(self, *transfer_syntaxes: str) -> "Scp":
        """Every storage class, in these transfer syntaxes (default: pynetdicom's)."""
        for context in AllStoragePresentationContexts:
            self._ae.add_supported_context(context.abstract_syntax, list(transfer_syntaxes) or context.transfer_syntax)
        self._ae.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
        self._ae.add_supported_context(Verification)
        return self

    def with_tls(self, context: ssl.SSLContext) -> "Scp":
        self._tls = context
        return self

    def __enter__(self) -> "Scp":
        handlers = [(evt.EVT_C_STORE, self._keep), (evt.EVT_N_EVENT_REPORT, self._report)]
        self._server = self._ae.start_server(
            (self.host, self.port), block=False, evt_handlers=handlers, ssl_context=self._tls
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    def _keep(self, event: evt.Event) -> int:
        if self.before:
            self.before(event)
        uid = str(event.request.AffectedSOPInstanceUID)
        self.stored[uid] = event.request.DataSet.getvalue()
        self.syntaxes[uid] = str(event.context.transfer_syntax)
        originator = event.request.MoveOriginatorApplicationEntityTitle
        self.originators.append((str(originator).strip(), event.request.MoveOriginatorMessageID))
        return self.status

    def _report(self, event: evt.Event) -> tuple[int, None]:
        self.reports.append((event.event_type, event.event_information))
        return 0x0000, None


class Orthanc:
    """Debian's Orthanc with Tandem as a modality, asked over its HTTP interface."""

    def __init__(self, folder: Path, tandem_port: int, dicom_port: int) -> None:
        self.folder, self.tandem_port, self.dicom_port = folder, tandem_port, dicom_port
        self.http_port = free_port()

    def ask(self, path: str, body: Any = None, raw: bytes | None = None) -> Any:
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{HOST}:{self.http_port}{path}", data=data)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def alive(self) -> bool:
        try:
            return bool(self.ask("/system"))
        except OSError:
            return False


@contextmanager
def orthanc(folder: Path, tandem_port: int, dicom_port: int) -> Iterator[Orthanc]:
    made = Orthanc(folder, tandem_port, dicom_port)
    folder.mkdir(parents=True)
    config = {
        "Name": "test",
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "DicomPort": dicom_port,
        "DicomAet": "ORTHANC",
        "DicomCheckCalledAet": False,
        "HttpPort": made.http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [],
        "DicomModalities": {"tandem": ["TANDEM", HOST, tandem_port]},
    }
    (folder / "orthanc.json").write_text(json.dumps(config))
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        wait_for(made.alive, "Orthanc")
        yield made
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def storescp(folder: Path, port: int, *options: str) -> Iterator[Path]:
    """DCMTK's storage server; yields the folder that it writes to."""
    folder.mkdir(parents=True)
    process = subprocess.Popen(["storescp", *options, "-od", str(folder), str(port)], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: run("echoscu", HOST, port, check=False) == "", "storescp")
        yield folder
    finally:
        process.terminate()
        process.wait(30)
