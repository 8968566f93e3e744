"""Which instances a retrieve is for (PS3.4 C.4.2, C.4.3)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydicom import Dataset

from gateway.dicom.identifiers import UNIQUE, BadQuery, level_of, values_of
from gateway.dicom.sop_classes import Model
from storage.state.model import Instance
from storage.store import Rows, identity_of, same_patient


@dataclass(frozen=True)
class Wanted:
    """The unique keys of a retrieve request; () where a level wasn't given."""

    level: str
    keys: Mapping[str, tuple[str, ...]]  # level -> values
    issuer: str = ""  # of the Patient ID, "" if none was named


def wanted(identifier: Dataset, model: Model) -> Wanted:
    """Raises BadQuery."""
    level = level_of(identifier, model)
    levels = model.levels if "PATIENT" in model.levels else ("PATIENT", *model.levels)
    keys = {one: tuple(values_of(identifier, UNIQUE[one])) for one in levels}
    if not keys[level]:
        raise BadQuery(f"{UNIQUE[level]} is needed at level {level}")
    if any("*" in value or "?" in value for values in keys.values() for value in values):
        raise BadQuery("a retrieve takes unique keys, no wild cards")
    if level == "PATIENT" and len(keys["PATIENT"]) > 1:
        raise BadQuery("one PatientID at level PATIENT")
    issuer = "".join(values_of(identifier, "IssuerOfPatientID"))
    return Wanted(level, {one: keys[one] for one in levels[: levels.index(level) + 1]}, issuer)


def instances(rows: Rows, wanted: Wanted) -> Iterator[Instance]:
    """What is stored of it. Blocks. Raises BadQuery where nobody can say which patient is meant."""
    if wanted.level == "PATIENT" and not wanted.issuer:
        _check_issuers(rows, wanted.keys["PATIENT"][0])
    if wanted.level == "IMAGE":
        for uid in dict.fromkeys(wanted.keys["IMAGE"]):
            found = rows.instance(uid)
            if found and _fits(found, wanted):
                yield found
        return
    for study in _studies(rows, wanted):
        series_wanted = wanted.keys.get("SERIES", ())
        for series, _ in rows.series_of(study):
            if not series_wanted or series in series_wanted:
                yield from (one for one in rows.instances_of(study, series) if _fits(one, wanted))


def _check_issuers(rows: Rows, patient_id: str) -> None:
    """One Patient ID of several issuers is several patients."""
    known = [identity_of(one) for _, study in rows.studies(patient_id) for one in study.patients]
    issuers = {issuer for one, issuer in known if one == patient_id.strip() and issuer}
    if len(issuers) > 1:
        raise BadQuery("this PatientID has several issuers: give IssuerOfPatientID")


def _studies(rows: Rows, wanted: Wanted) -> Iterator[str]:
    if given := wanted.keys.get("STUDY", ()):
        yield from dict.fromkeys(given)
    elif patient := wanted.keys.get("PATIENT", ()):
        yield from (uid for one in dict.fromkeys(patient) for uid, _ in rows.studies(one))
    else:  # relational: by series alone
        series = dict.fromkeys(wanted.keys.get("SERIES", ()))
        yield from dict.fromkeys(uid for one in series for uid in rows.studies_of_series(one))


def _fits(instance: Instance, wanted: Wanted) -> bool:
    put = instance.put
    has = {"STUDY": put.study, "SERIES": put.series}
    if not all(not wanted.keys.get(level) or value in wanted.keys[level] for level, value in has.items()):
        return False
    patients = wanted.keys.get("PATIENT", ())
    if not patients:
        return True
    own = identity_of(put.keys)
    return any(same_patient((one.strip(), wanted.issuer), own) for one in patients)
