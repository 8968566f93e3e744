"""The demo: a pair takes real images, answers queries, keeps files over SMB, and survives losing a node."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tools.lab.network import VIP, LabError
from tools.lab.pair import AET, DICOM_PORT, FILES_SHARE, Lab, can_mount, wait_for
from tools.lab.samples import archived, content_digest, copies, distinct_files, file_digest, sop_instance

BATCH: Final = 8
COPIES: Final = 240
SEND_AGAIN_S: Final = 0.2
GIVE_UP_S: Final = 90.0
SYNC_TIMEOUT_S: Final = 90.0
USER, PASSWORD = "demo", "demo"  # of the share
FILE_BYTES: Final = 135_000
SENDING = re.compile(r"Sending file: (\S+)")
ANSWER = re.compile(r"Received Store Response \(([^)]*)\)")

console = Console(stderr=False)


@dataclass
class Report:
    rows: list[tuple[str, str, bool]] = field(default_factory=list)

    def add(self, what: str, found: str, ok: bool) -> None:
        self.rows.append((what, found, ok))

    @property
    def ok(self) -> bool:
        return all(ok for _, _, ok in self.rows)

    def show(self) -> None:
        table = Table(title="Tandem demo")
        table.add_column("what")
        table.add_column("found")
        table.add_column("")
        for what, found, ok in self.rows:
            table.add_row(what, found, "[green]ok[/green]" if ok else "[red]NO[/red]")
        console.print(table)


class Modality:
    """Sends as a modality does: on any failure it connects again and sends what was not acknowledged."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.acknowledged: dict[Path, float] = {}  # when Success was heard
        self.refused: dict[Path, str] = {}

    def dcmsend(self, paths: list[Path]) -> None:
        """One association, objects as they are in the files."""
        words = ["dcmsend", "-v", "-dn", "-to", "5", "-ta", "10", "-aec", AET, VIP, str(DICOM_PORT)]
        output = self._run([*words, *map(str, paths)])
        answers = re.findall(r"Received C-STORE Response \(([^)]*)\)", output)
        for path, answer in zip(paths, answers, strict=False):
            self._note(path, answer)

    def storescu_until_done(self, paths: list[Path], progress: Callable[[int], None]) -> None:
        deadline = time.monotonic() + GIVE_UP_S
        while left := [path for path in paths if path not in self.acknowledged and path not in self.refused]:
            if time.monotonic() > deadline:
                return
            self._storescu(left, progress)
            time.sleep(SEND_AGAIN_S)

    def _storescu(self, paths: list[Path], progress: Callable[[int], None]) -> None:
        words = ["stdbuf", "-oL", "-eL", "storescu", "-v", "-R", "-to", "1", "-ta", "2", "-td", "2"]
        argv, environment = self._lab.command("client", [*words, "-aec", AET, VIP, str(DICOM_PORT), *map(str, paths)])
        process = subprocess.Popen(
            argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        current: Path | None = None
        for line in process.stdout or ():
            if sending := SENDING.search(line):
                current = Path(sending.group(1))
            elif (answer := ANSWER.search(line)) and current:
                self._note(current, answer.group(1))
                progress(len(self.acknowledged))
        process.wait()

    def _note(self, path: Path, answer: str) -> None:
        if answer.startswith("Success"):
            self.acknowledged[path] = time.monotonic()
        else:
            self.refused[path] = answer

    def _run(self, words: list[str]) -> str:
        argv, environment = self._lab.command("client", words)
        done = subprocess.run(
            argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        return done.stdout


class OldPacs:
    """Keeps files on the share, as PACS software does that knows nothing of Tandem: writes each under a name for the
    time being, closes and renames it, and tries again what failed."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self._lab, self._folder = lab, folder
        self.stored: dict[str, bytes] = {}  # what smbd has said is done
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        folder.mkdir()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            name, data = f"{len(self.stored)}.img", os.urandom(FILE_BYTES)
            (self._folder / name).write_bytes(data)
            what = f"put {self._folder / name} {name}.tmp; rename {name}.tmp {name} -f"
            while not self.smbclient(what)[0]:
                if self._stop.wait(SEND_AGAIN_S):
                    return
            self.stored[name] = data

    def smbclient(self, what: str) -> tuple[bool, str]:
        """(all of it was done, what was printed)"""
        words = ["timeout", "10", "smbclient", f"//{VIP}/{FILES_SHARE}", "-U", f"{USER}%{PASSWORD}", "-c", what]
        argv, environment = self._lab.command("client", words)
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, errors="replace")
        said = done.stdout + done.stderr
        return done.returncode == 0 and "NT_STATUS" not in said, said

    def kept(self) -> dict[str, bytes]:
        """What is on the share, read over SMB."""
        fetched = self._folder / "fetched"
        fetched.mkdir()
        self.smbclient(f"lcd {fetched}; prompt OFF; mget *.img")
        return {path.name: path.read_bytes() for path in fetched.iterdir()}


def compare_kept(pacs: OldPacs, node: str, report: Report) -> None:
    kept = pacs.kept()
    bad = [name for name, data in pacs.stored.items() if kept.get(name) != data]
    found = f"{len(pacs.stored) - len(bad)} of {len(pacs.stored)} written over SMB, by their bytes"
    report.add(f"files on the survivor {node}", found, bool(pacs.stored) and not bad)


def compare_files(lab: Lab, pacs: OldPacs, report: Report) -> None:
    """As both nodes show them."""
    wait_for("both nodes to have every file", lab.files_complete, SYNC_TIMEOUT_S)
    bad = [
        (node, name)
        for node in ("a", "b")
        for name, data in pacs.stored.items()
        if (lab.files_from_outside(node) / name).read_bytes() != data
    ]
    report.add("files on both nodes", f"{len(pacs.stored)}, {'DIFFERENT' if bad else 'same'}", not bad)


def client(lab: Lab, *words: str) -> str:
    argv, environment = lab.command("client", list(words))
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, errors="replace")
    return done.stdout + done.stderr


def send_real_files(modality: Modality, report: Report) -> None:
    files = distinct_files()
    with Progress(console=console) as progress:
        task = progress.add_task("sending pydicom-data with dcmsend", total=len(files))
        for start in range(0, len(files), BATCH):
            modality.dcmsend(files[start : start + BATCH])
            progress.update(task, completed=min(start + BATCH, len(files)))
        silent = [path for path in files if path not in modality.acknowledged and path not in modality.refused]
        for path in silent:  # dcmsend ends an association at a file that it can't send itself
            modality.dcmsend([path])
    heard = len(modality.acknowledged) + len(modality.refused)
    unsent = [path.name for path in files if path not in modality.acknowledged and path not in modality.refused]
    found = f"{len(modality.acknowledged)} acknowledged, {len(modality.refused)} refused"
    if unsent:
        found += f", {len(unsent)} that dcmsend can't send"
    report.add("real files sent", found, len(modality.acknowledged) > 30 and heard + len(unsent) == len(files))
    for path, answer in modality.refused.items():
        console.print(f"  refused: {path.name}: {answer}")


def query(lab: Lab, modality: Modality, report: Report) -> None:
    output = client(
        lab,
        *("findscu", "-v", "-S", "-aec", AET, "-k", "QueryRetrieveLevel=STUDY", "-k", "PatientName"),
        *("-k", "StudyInstanceUID", "-k", "NumberOfStudyRelatedInstances", VIP, str(DICOM_PORT)),
    )
    counts = [int(count) for count in re.findall(r"\(0020,1208\) IS \[(\d+) *\]", output)]
    known = {sop_instance(path) for path in modality.acknowledged}
    report.add("findscu", f"{len(counts)} studies, {sum(counts)} instances", sum(counts) == len(known))


def share(lab: Lab, folder: Path, modality: Modality, report: Report) -> None:
    listed = client(lab, "smbclient", "-N", "-U%", f"//{VIP}/archive", "-c", "recurse; ls")
    names = re.findall(r"^\s+(\S+\.dcm)\s+", listed, flags=re.MULTILINE)
    report.add(
        "smbclient lists", f"{len(names)} files", len(names) == len({sop_instance(p) for p in modality.acknowledged})
    )
    primary = lab.primary() or "a"
    held = archived(lab.volumes(primary))
    path = next(path for path in modality.acknowledged if sop_instance(path) in held)
    stored = held[sop_instance(path)]
    relative = str(stored).split("/archive/", 1)[1]
    fetched = folder / "fetched.dcm"
    client(lab, "smbclient", "-N", "-U%", f"//{VIP}/archive", "-c", f'get "{relative}" {fetched}')
    same = fetched.exists() and file_digest(fetched) == file_digest(stored)
    report.add("smbclient fetches one", "same bytes" if same else "differs", same)


def power_pulled(lab: Lab, folder: Path, modality: Modality, report: Report) -> str:
    """Send many, pull the primary's power in the middle, go on as a modality would. Returns the node that is off."""
    files = copies(folder / "copies", COPIES)
    before = len(modality.acknowledged)
    lost = lab.primary() or "a"
    pulled_at = 0.0
    with Progress(console=console) as progress:
        task = progress.add_task("sending with storescu, primary loses power", total=len(files))

        def sent(total: int) -> None:
            nonlocal pulled_at
            progress.update(task, completed=total - before)
            if not pulled_at and total - before >= len(files) // 3:
                pulled_at = time.monotonic()
                lab.power_off(lost)

        modality.storescu_until_done(files, sent)
    times = [modality.acknowledged[path] for path in files if path in modality.acknowledged]
    report.add(f"sent while {lost} lost power", f"{len(times)} of {len(files)} acknowledged", len(times) == len(files))
    earlier = max((at for at in times if at <= pulled_at), default=pulled_at)
    later = min((at for at in times if at > pulled_at + 0.2), default=float("inf"))
    report.add("outage seen by the sender", f"{later - earlier:.1f} s", later < float("inf"))
    return lost


def compare_with_sent(lab: Lab, node: str, modality: Modality, report: Report) -> None:
    held = archived(lab.volumes(node))
    bad = [
        path
        for path in modality.acknowledged
        if (stored := held.get(sop_instance(path))) is None or content_digest(stored) != content_digest(path)
    ]
    found = f"{len(modality.acknowledged) - len(bad)} of {len(modality.acknowledged)} acknowledged, by digest"
    report.add(f"on the survivor {node}", found, not bad)
    for path in bad[:5]:
        console.print(f"  missing or different: {path.name}")


def compare_copies(lab: Lab, report: Report) -> None:
    digests = []
    for node in ("a", "b"):
        digests.append({uid: file_digest(path) for uid, path in archived(lab.volumes(node)).items()})
    same = digests[0] == digests[1]
    report.add("both copies", f"{len(digests[0])} and {len(digests[1])} files, {'same' if same else 'DIFFERENT'}", same)


def demo(lab: Lab, folder: Path, report: Report) -> None:
    modality = Modality(lab)
    send_real_files(modality, report)
    query(lab, modality, report)
    share(lab, folder, modality, report)
    pacs = OldPacs(lab, folder / "pacs") if can_mount() else None
    if pacs is not None:
        lab.add_user(USER, PASSWORD)
    with pacs.at_work() if pacs is not None else contextlib.nullcontext():
        lost = power_pulled(lab, folder, modality, report)
    survivor = "b" if lost == "a" else "a"
    compare_with_sent(lab, survivor, modality, report)
    if pacs is not None:
        compare_kept(pacs, survivor, report)
    started = time.monotonic()
    lab.power_on(lost)
    with console.status(f"{lost} is on again and catches up ..."):
        lab.wait_in_sync(SYNC_TIMEOUT_S)
        report.add(f"{lost} in sync again", f"{time.monotonic() - started:.1f} s after power-on", True)
        wait_for("the returned node to have every copy", lab.complete, SYNC_TIMEOUT_S)
    report.add(f"{lost} has every copy", f"{time.monotonic() - started:.1f} s after power-on", True)
    compare_copies(lab, report)
    if pacs is not None:
        compare_files(lab, pacs, report)


@click.command()
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="Where the nodes' data lie; default: a new folder."
)
@click.option("--ttl", default=3.0, show_default=True, help="Lease in seconds: how soon a lost node is noticed.")
@click.option("--keep", is_flag=True, help="Leave the pair running.")
def main(folder: Path | None, ttl: float, keep: bool) -> None:
    """Bring up a pair, send images and files to it, pull a node's power in the middle; check that nothing was lost."""
    warnings.simplefilter("ignore", UserWarning)  # pydicom's remarks on odd files, which are part of the show
    base = folder.resolve() if folder else Path(tempfile.mkdtemp(prefix="tandem-demo-"))
    lab, report = Lab(base / "lab"), Report()
    try:
        with console.status("bringing up two nodes and a witness ..."):
            lab.up(ttl, 1)
        demo(lab, base, report)
    except LabError as error:
        report.add("demo", str(error), False)
    finally:
        report.show()
        if keep:
            tell_how(lab)
        else:
            lab.down(keep_data=False)
            if folder is None:
                shutil.rmtree(base, ignore_errors=True)
    sys.exit(0 if report.ok else 1)


def tell_how(lab: Lab) -> None:
    console.print(
        f"The pair is up in {lab.dir}. From another shell, for example:\n"
        f"  .venv/bin/tandem lab exec client -- storescu -v -R -aec {AET} {VIP} {DICOM_PORT} FILE.dcm\n"
        f"  .venv/bin/tandem lab exec client -- findscu -S -aec {AET} -k QueryRetrieveLevel=STUDY -k PatientName "
        f"-k StudyInstanceUID {VIP} {DICOM_PORT}\n"
        f"  .venv/bin/tandem lab exec client -- smbclient -N -U% //{VIP}/archive -c 'recurse; ls'\n"
        f"  .venv/bin/tandem lab exec client -- smbclient -U {USER}%{PASSWORD} //{VIP}/{FILES_SHARE} -c 'ls'\n"
        f"  .venv/bin/tandem lab status\n  .venv/bin/tandem lab power-off a\n  .venv/bin/tandem lab down",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
