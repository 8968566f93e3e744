"""Each service with independent software: DCMTK, Orthanc, GDCM, pynetdicom, dcmjs-dimse."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import (
    CTImageStorage,
    MRImageStorage,
    PatientRootQueryRetrieveInformationModelFind,
    PatientRootQueryRetrieveInformationModelMove,
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelGet,
)

from tests.conftest import Gateway, free_port, wait_for
from tests.interop.clients import HOST, Scp, dcmjs, gdcm, orthanc, run, storescp
from tools.cli.dicom_files import read_object
from tools.lab.samples import archived, content_digest, copies, sop_instance

COUNT = 12
CT = str(CTImageStorage)


@dataclass
class Site:
    """A gateway with a dozen images, and the ports of those it may send to."""

    gateway: Gateway
    files: dict[str, Path]  # SOP Instance UID -> file
    ports: dict[str, int]

    @property
    def port(self) -> int:
        return self.gateway.port

    @property
    def studies(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for uid, path in self.files.items():
            found.setdefault(str(dcmread(path, specific_tags=["StudyInstanceUID"]).StudyInstanceUID), []).append(uid)
        return found

    @property
    def largest(self) -> tuple[str, list[str]]:
        """(Study Instance UID, its SOP Instance UIDs)."""
        return max(self.studies.items(), key=lambda item: len(item[1]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("interop")
    ports = {name: free_port() for name in ("STORESCP", "PYNETDICOM", "ORTHANC")}
    known = ", ".join(f'{name} = {{ host = "{HOST}", port = {port} }}' for name, port in ports.items())
    gateway = Gateway(folder / "data", TANDEM__DICOM__DESTINATIONS=f"{{ {known} }}").start()
    files = {sop_instance(path): path for path in copies(folder / "files", COUNT)}
    run("dcmsend", "-aec", "TANDEM", HOST, gateway.port, *files.values())
    yield Site(gateway, files, ports)
    gateway.stop()


def associate(site: Site, *contexts: str, **options: object) -> object:
    ae = AE("PYNETDICOM")
    for context in contexts:
        ae.add_requested_context(context)
    association = ae.associate(HOST, site.port, ae_title="TANDEM", **options)
    assert association.is_established
    return association


def keys(level: str, **values: object) -> Dataset:
    made = Dataset()
    made.QueryRetrieveLevel = level
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


# -- verification and storage ------------------------------------------------------------------------------------------


def test_echo(site: Site) -> None:
    run("echoscu", "-aec", "TANDEM", HOST, site.port)
    gdcm("--echo", "--call", "TANDEM", HOST, site.port)
    assert dcmjs(site.port, "echo")["statuses"] == [0]


def test_store(site: Site, tmp_path: Path) -> None:
    fresh = copies(tmp_path / "fresh", 4)
    before = site.gateway.status()["instances"]
    run("storescu", "-aec", "TANDEM", HOST, site.port, fresh[0])
    gdcm("--store", "--call", "TANDEM", "-i", fresh[1], HOST, site.port)
    assert dcmjs(site.port, "store", fresh[2])["statuses"] == [0]
    with orthanc(tmp_path / "orthanc", site.port, site.ports["ORTHANC"]) as peer:
        known = peer.ask("/instances", raw=fresh[3].read_bytes())
        assert peer.ask("/modalities/tandem/store", [known["ID"]])["FailedInstancesCount"] == 0
    wait_for(lambda: site.gateway.status()["instances"] == before + 4, "four more")


# -- query -------------------------------------------------------------------------------------------------------------


def test_find_with_dcmtk(site: Site) -> None:
    study, members = site.largest
    found = run(
        "findscu", "-S", "-aec", "TANDEM", HOST, site.port, "-k", "QueryRetrieveLevel=IMAGE",
        "-k", f"StudyInstanceUID={study}", "-k", f"SeriesInstanceUID={series_of(site, study)}", "-k", "SOPInstanceUID",
    )  # fmt: skip
    assert set(re.findall(r"0008,0018\) UI \[([0-9.]+)", found)) == set(members)
    patient = str(dcmread(site.files[members[0]]).PatientID)
    found = run("findscu", "-P", "-aec", "TANDEM", HOST, site.port, "-k", "QueryRetrieveLevel=PATIENT", "-k",
                f"PatientID={patient}", "-k", "NumberOfPatientRelatedInstances")  # fmt: skip
    assert f"[{patient}" in found


def series_of(site: Site, study: str) -> str:
    return str(dcmread(site.files[site.studies[study][0]]).SeriesInstanceUID)


def test_find_with_gdcm(site: Site) -> None:
    study, _ = site.largest
    found = gdcm("--find", "--studyroot", "--study", "--call", "TANDEM", "--key", f"20,d={study}",
                "--key", "10,10=", HOST, site.port)  # fmt: skip
    assert study in found


def test_find_with_dcmjs_and_orthanc(site: Site, tmp_path: Path) -> None:
    study, _ = site.largest
    found = dcmjs(site.port, "find", study)
    assert found["statuses"][-1] == 0
    assert [answer["StudyInstanceUID"] for answer in found["answers"]] == [study]
    with orthanc(tmp_path / "orthanc", site.port, site.ports["ORTHANC"]) as peer:
        asked = {"Level": "Study", "Query": {"StudyInstanceUID": study, "PatientName": ""}}
        query = peer.ask("/modalities/tandem/query", asked)
        assert len(peer.ask(f"/queries/{query['ID']}/answers")) == 1


def test_find_any_attribute_and_in_sequences(site: Site) -> None:
    """Attributes that the catalogue doesn't have come from the file, at every level."""
    uid, path = next(iter(site.files.items()))
    whole = dcmread(path)
    association = associate(site, PatientRootQueryRetrieveInformationModelFind)
    asked = keys("STUDY", PatientID=whole.PatientID, StudyInstanceUID=whole.StudyInstanceUID, ImageType=None)
    answers = [one for _, one in association.send_c_find(asked, PatientRootQueryRetrieveInformationModelFind) if one]
    assert list(answers[0].ImageType) == list(whole.ImageType)
    association.release()
    assert uid


# -- retrieve ----------------------------------------------------------------------------------------------------------


def same(files: list[Path], site: Site) -> None:
    for path in files:
        assert content_digest(path) == content_digest(site.files[sop_instance(path)])


def test_get(site: Site, tmp_path: Path) -> None:
    study, members = site.largest
    (tmp_path / "got").mkdir()
    run("getscu", "-S", "-aec", "TANDEM", "-od", tmp_path / "got", HOST, site.port, "-k", "QueryRetrieveLevel=STUDY",
        "-k", f"StudyInstanceUID={study}")  # fmt: skip
    got = list((tmp_path / "got").iterdir())
    assert len(got) == len(members)
    same(got, site)
    found = dcmjs(site.port, "get", study)
    assert sorted(found["received"]) == sorted(members)
    assert found["statuses"][-1] == 0


def test_move(site: Site, tmp_path: Path) -> None:
    study, members = site.largest
    with storescp(tmp_path / "got", site.ports["STORESCP"]) as folder:
        run("movescu", "-S", "-aec", "TANDEM", "-aem", "STORESCP", HOST, site.port, "-k", "QueryRetrieveLevel=STUDY",
            "-k", f"StudyInstanceUID={study}")  # fmt: skip
        got = list(folder.iterdir())
    assert len(got) == len(members)
    same(got, site)
    with Scp("PYNETDICOM", site.ports["PYNETDICOM"]).takes() as scp:
        statuses = dcmjs(site.port, "move", study, "PYNETDICOM")["statuses"]
        assert statuses[-1] == 0
        assert statuses.count(0xFF00) == len(members) - 1
        kept = archived([site.gateway.volume])
        assert {uid: read_object(kept[uid]).data for uid in members} == scp.stored
        assert {aet for aet, _ in scp.originators} == {"DCMJS"}


def test_orthanc_retrieves(site: Site, tmp_path: Path) -> None:
    study, members = site.largest
    with orthanc(tmp_path / "orthanc", site.port, site.ports["ORTHANC"]) as peer:
        query = peer.ask("/modalities/tandem/query", {"Level": "Study", "Query": {"StudyInstanceUID": study}})
        peer.ask(f"/queries/{query['ID']}/retrieve", {"TargetAet": "ORTHANC", "Synchronous": True})
        assert len(peer.ask("/instances")) == len(members)


# -- storage commitment ------------------------------------------------------------------------------------------------


def references(pairs: list[tuple[str, str]]) -> list[Dataset]:
    items = []
    for sop_class, uid in pairs:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
        items.append(item)
    return items


def pairs_of(site: Site) -> list[tuple[str, str]]:
    return [(read_object(path).sop_class, uid) for uid, path in site.files.items()]


def test_commitment_is_reported_on_the_same_association(site: Site) -> None:
    found = dcmjs(site.port, "commit", generate_uid(), *(text for pair in pairs_of(site) for text in pair))
    assert found["statuses"] == [0]
    assert found["event"]["type"] == 1
    assert len(found["event"]["ReferencedSOPSequence"]) == COUNT


def test_commitment_is_reported_on_a_new_association(site: Site) -> None:
    pairs, missing = pairs_of(site), generate_uid()
    wrong_class = (str(MRImageStorage if pairs[0][0] == CT else CTImageStorage), pairs[0][1])
    with Scp("PYNETDICOM", site.ports["PYNETDICOM"]).takes() as scp:
        association = associate(site, StorageCommitmentPushModel)
        action = Dataset()
        action.TransactionUID = generate_uid()
        action.ReferencedSOPSequence = references([*pairs[1:], wrong_class, (CT, missing)])
        status, _ = association.send_n_action(action, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance)
        assert status.Status == 0
        association.abort()
        wait_for(lambda: scp.reports, "the report")
        kind, report = scp.reports[0]
    assert kind == 2
    assert report.TransactionUID == action.TransactionUID
    assert {item.ReferencedSOPInstanceUID for item in report.ReferencedSOPSequence} == {uid for _, uid in pairs[1:]}
    reasons = {str(item.ReferencedSOPInstanceUID): item.FailureReason for item in report.FailedSOPSequence}
    assert reasons == {missing: 0x0112, wrong_class[1]: 0x0119}


def test_orthanc_asks_for_commitment(site: Site, tmp_path: Path) -> None:
    with orthanc(tmp_path / "orthanc", site.port, site.ports["ORTHANC"]) as peer:
        asked = {"DicomInstances": [list(pair) for pair in pairs_of(site)], "Timeout": 30}
        transaction = peer.ask("/modalities/tandem/storage-commitment", asked)["ID"]

        def status() -> str:
            found: str = peer.ask(f"/storage-commitment/{transaction}")["Status"]
            return "" if found == "Pending" else found

        assert wait_for(status, "the report") == "Success"


def test_get_keeps_going_past_what_is_refused(site: Site) -> None:
    study, members = site.largest
    refused = members[0]

    def keep(event: evt.Event) -> int:
        return 0xA700 if event.request.AffectedSOPInstanceUID == refused else 0xB000

    kinds = {read_object(site.files[uid]).sop_class for uid in members}
    roles = [build_role(kind, scp_role=True) for kind in kinds]
    ae = AE("PYNETDICOM")
    ae.add_requested_context(StudyRootQueryRetrieveInformationModelGet)
    for kind in kinds:
        ae.add_requested_context(kind)
    association = ae.associate(
        HOST, site.port, ae_title="TANDEM", ext_neg=roles, evt_handlers=[(evt.EVT_C_STORE, keep)]
    )
    answers = list(
        association.send_c_get(keys("STUDY", StudyInstanceUID=study), StudyRootQueryRetrieveInformationModelGet)
    )
    association.release()
    status, failed = answers[-1]
    assert status.Status == 0xB000
    assert status.NumberOfFailedSuboperations == 1
    assert status.NumberOfWarningSuboperations == len(members) - 1
    assert failed.FailedSOPInstanceUIDList == refused


def test_patient_root_move(site: Site) -> None:
    whole = dcmread(next(iter(site.files.values())))
    expected = {uid for uid, path in site.files.items() if dcmread(path).PatientID == whole.PatientID}
    with Scp("PYNETDICOM", site.ports["PYNETDICOM"]).takes() as scp:
        association = associate(site, PatientRootQueryRetrieveInformationModelMove)
        asked = keys("PATIENT", PatientID=whole.PatientID)
        answers = list(association.send_c_move(asked, "PYNETDICOM", PatientRootQueryRetrieveInformationModelMove))
        association.release()
        assert answers[-1][0].Status == 0
        assert expected <= set(scp.stored)
