"""Names in the readable tree: every component safe on every file system and SMB client, collisions told apart."""

import re
from typing import Final

import xxhash

COMPONENT_CHARS_MAX: Final = 64
# What Windows and SMB forbid, separators, and control characters.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f<>:"/\\|?*]')
_RESERVED = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(\..*)?$", re.IGNORECASE)


def short_hash(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))[:6]


def component(text: str, fallback: str) -> str:
    """One safe path component that a person recognises; a short hash is added whenever something was changed."""
    original = text.strip()
    if not original:
        return fallback
    safe = _UNSAFE.sub("_", original).encode("utf-8", "replace").decode().strip(". ")
    while len(safe.encode()) > COMPONENT_CHARS_MAX:
        safe = safe[:-1]
    if safe == original and not _RESERVED.match(safe):
        return safe
    return f"{safe}~{short_hash(original)}"


def uid_tail(uid: str) -> str:
    """The end of a UID, which differs most, and a hash of the whole."""
    return f"{uid[-10:].strip('.')}-{short_hash(uid)}"


def patient_folder(patient_id: str) -> str:
    return component(patient_id, "NO_ID")


def study_folder(study: str, date: str, modality: str) -> str:
    return component(f"{date or 'NODATE'}_{modality or 'OT'}_{uid_tail(study)}", "STUDY")


def series_folder(series: str, number: str) -> str:
    return component(f"{number or '0'}_{uid_tail(series)}", "SERIES")
