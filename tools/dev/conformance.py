"""The tables of docs/conformance.md, made of what the code does. `python -m tools.dev.conformance` writes them anew."""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from pydicom.datadict import dictionary_VR, keyword_dict
from pynetdicom.sop_class import _STORAGE_CLASSES

from conf.settings import DicomSettings
from gateway.archive.find import COUNTS, GATHERED
from gateway.dicom.dimse import Status
from gateway.dicom.identifiers import UNIQUE
from gateway.dicom.matching import NUMBER_VRS, RANGE_VRS, WILD_VRS
from gateway.dicom.sop_classes import (
    COMMITMENT,
    FIND_MODELS,
    GET_MODELS,
    MOVE_MODELS,
    STORAGE_CLASSES,
    TRANSFER_SYNTAXES,
    UNCOMPRESSED,
    VERIFICATION,
    name_of,
)
from gateway.dicom.transcode import TARGETS
from gateway.dicom.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION
from gateway.dimse.negotiate import WINDOW_MAX
from gateway.dimse.requestor import WINDOW
from storage.state import keys
from storage.state.description import CREATOR

DOCUMENT: Final = Path(__file__).resolve().parent.parent.parent / "docs" / "conformance.md"
REGION: Final = re.compile(r"(<!-- table: ([a-z-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def network_services() -> str:
    def rows() -> Iterable[tuple[str, str, str, str]]:
        yield "Verification", name_of(VERIFICATION), "no", "yes"
        for kind, models in (("Query", FIND_MODELS), ("Retrieve", MOVE_MODELS), ("Retrieve", GET_MODELS)):
            for uid in models:
                yield kind, name_of(uid), "no", "yes"
        yield "Storage Commitment", name_of(COMMITMENT), "no", "yes"
        yield "Transfer", f"{len(STORAGE_CLASSES)} storage SOP classes, see N.8", "yes (C-MOVE, C-GET)", "yes"

    return _table(("Service", "SOP class", "User (SCU)", "Provider (SCP)"), rows())


def implementation() -> str:
    return _table(
        ("Item", "Value"),
        (
            ("Implementation Class UID", IMPLEMENTATION_CLASS_UID),
            ("Implementation Version Name", IMPLEMENTATION_VERSION),
            ("Private Information Creator UID, in stored files", CREATOR),
        ),
    )


def association_limits() -> str:
    fields = DicomSettings.model_fields
    rows = [
        (label, fields[key].default, f"`dicom.{key}`")
        for label, key in (
            ("Maximum PDU length that is accepted, bytes", "max_pdu_bytes"),
            ("Established associations at once", "max_associations"),
            ("TCP connections at once", "max_connections"),
            ("ARTIM timer, s", "artim_timeout_s"),
            ("Longest pause between messages, s", "idle_timeout_s"),
            ("Longest time for one message, s", "message_timeout_s"),
            ("TCP port", "port"),
            ("AE title", "aet"),
        )
    ]
    rows.append(("Asynchronous operations that others may invoke", WINDOW_MAX, "fixed; answered in their order"))
    rows.append(("Asynchronous operations that we invoke (C-MOVE)", WINDOW, "fixed; fewer if the destination says so"))
    return _table(("Limit", "Default", "Setting"), rows)


def uncompressed() -> str:
    return _table(("Transfer syntax", "UID"), ((name_of(uid), uid) for uid in UNCOMPRESSED))


def conversions() -> str:
    return _table(("Converted to", "UID"), ((name_of(uid), uid) for uid in TARGETS))


def transfer_syntaxes() -> str:
    return _table(("Transfer syntax", "UID"), ((name_of(uid), uid) for uid in TRANSFER_SYNTAXES))


def storage_classes() -> str:
    current = {str(uid) for uid in _STORAGE_CLASSES.values()}
    rows = sorted((name_of(uid), uid, "" if uid in current else "retired") for uid in STORAGE_CLASSES)
    return _table(("SOP class", "UID", ""), rows)


def models() -> str:
    rows = [
        (model.name, ", ".join(model.levels), find, move, get)
        for (find, model), move, get in zip(FIND_MODELS.items(), MOVE_MODELS, GET_MODELS, strict=True)
    ]
    return _table(("Model", "Levels", "FIND", "MOVE", "GET"), rows)


def query_keys() -> str:
    def rows() -> Iterable[tuple[str, str, str, str, str]]:
        for level, kept in keys.LEVELS.items():
            for keyword, tag in kept.items():
                unique = "unique" if UNIQUE[level] == keyword else "catalogue"
                yield level, keyword, f"({tag >> 16:04X},{tag & 0xFFFF:04X})", unique, _matching(keyword)
        for keyword, level in (GATHERED | COUNTS).items():
            tag = _tag(keyword)
            matched = _matching(keyword) if keyword in GATHERED else "returned only"
            yield level, keyword, f"({tag >> 16:04X},{tag & 0xFFFF:04X})", "computed", matched

    return _table(("Level", "Attribute", "Tag", "From", "Matching"), rows())


def _tag(keyword: str) -> int:
    return keyword_dict[keyword]


def _matching(keyword: str) -> str:
    vr = dictionary_VR(keyword)
    if vr == "UI":
        return "universal, single value, list of UID"
    if vr in RANGE_VRS:
        return "universal, single value, range"
    if vr in WILD_VRS:
        return "universal, single value, wild card"
    return "universal, single value (as a number)" if vr in NUMBER_VRS else "universal, single value"


def statuses() -> str:
    return _table(
        ("Status", "Meaning here"),
        ((f"0x{status.value:04X}", name.replace("_", " ").lower()) for name, status in Status.__members__.items()),
    )


TABLES: Final[dict[str, Callable[[], str]]] = {
    "network-services": network_services,
    "implementation": implementation,
    "association-limits": association_limits,
    "uncompressed": uncompressed,
    "conversions": conversions,
    "models": models,
    "query-keys": query_keys,
    "statuses": statuses,
    "transfer-syntaxes": transfer_syntaxes,
    "storage-classes": storage_classes,
}


def renewed(text: str) -> str:
    """The document with its tables as the code has them now."""
    return REGION.sub(lambda found: found[1] + TABLES[found[2]]() + found[4], text)


if __name__ == "__main__":
    DOCUMENT.write_text(renewed(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{DOCUMENT.name} written\n")
