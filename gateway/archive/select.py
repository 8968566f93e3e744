"""Which instances a retrieve is for (PS3.4 C.4.2, C.4.3)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydicom import Dataset

from gateway.dicom.identifiers import UNIQUE, BadQuery, level_of, values_of
from gateway.dicom.sop_classes import Model
from storage.state.model import Instance
from storage.store import Rows


@dataclass(frozen=True)
class Wanted:
    """The unique keys of a retrieve request; () where a level wasn't given."""

    level: str
    keys: Mapping[str, tuple[str, ...]]  # level -> values


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
    return Wanted(level, {one: keys[one] for one in levels[: levels.index(level) + 1]})


def instances(rows: Rows, wanted: Wanted) -> Iterator[Instance]:
    """What is stored of it. Blocks."""
    if wanted.level == "IMAGE":
        for uid in wanted.keys["IMAGE"]:
            found = rows.instance(uid)
            if found and _fits(found, wanted):
                yield found
        return
    for study in _studies(rows, wanted):
        series_wanted = wanted.keys.get("SERIES", ())
        for series, _ in rows.series_of(study):
            if not series_wanted or series in series_wanted:
                yield from (one for one in rows.instances_of(study, series) if _fits(one, wanted))


def _studies(rows: Rows, wanted: Wanted) -> Iterator[str]:
    if given := wanted.keys.get("STUDY", ()):
        yield from given
    elif patient := wanted.keys.get("PATIENT", ()):
        yield from (uid for uid, _ in rows.studies(patient[0]))
    else:  # relational: by series alone
        yield from (uid for uid, _ in rows.studies())


def _fits(instance: Instance, wanted: Wanted) -> bool:
    put = instance.put
    has = {"STUDY": put.study, "SERIES": put.series, "PATIENT": put.keys.get("PatientID", "")}
    return all(not wanted.keys.get(level) or value in wanted.keys[level] for level, value in has.items())
