"""Real images for the demo and the tests: the files of pydicom-data, and copies of them under fresh UIDs."""

import hashlib
from pathlib import Path

from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid

TRAILING_PADDING = 0xFFFCFFFC
MULTIPLE = ("693_UNCI.dcm", "MR2_UNCI.dcm", "RG1_UNCI.dcm", "US1_UNCI.dcm", "liver.dcm")


def data_folder() -> Path:
    import data_store

    return Path(data_store.__path__[0]) / "data"


def distinct_files() -> list[Path]:
    """Part 10 files of pydicom-data, one for each SOP Instance UID (some images are there in several encodings)."""
    found: dict[str, Path] = {}
    for path in sorted(data_folder().rglob("*.dcm")):
        if path.read_bytes()[128:132] != b"DICM":
            continue
        header = dcmread(path, specific_tags=["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"])
        if header.get("SOPInstanceUID") and header.get("StudyInstanceUID") and header.get("SeriesInstanceUID"):
            found.setdefault(str(header.SOPInstanceUID), path)
    return list(found.values())


def copies(folder: Path, count: int) -> list[Path]:
    """`count` files below `folder`: real CT, MR, radiography and ultrasound images under fresh UIDs."""
    folder.mkdir(parents=True, exist_ok=True)
    templates = [dcmread(data_folder() / name) for name in MULTIPLE]
    studies = [(generate_uid(), generate_uid()) for _ in templates]
    made = []
    for number in range(count):
        kind = number % len(templates) if number % 10 == 0 else number % 2  # mostly CT and MR, as in a hospital
        dataset = templates[kind]
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = studies[kind]
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.InstanceNumber = number + 1
        path = folder / f"{number:05d}.dcm"
        dataset.save_as(path)
        made.append(path)
    return made


def sop_instance(path: Path) -> str:
    return str(dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID)


def content_digest(path: Path) -> str:
    """SHA-256 over tags and values of a file's data set.

    Senders may write lengths differently than the file they read, so files can't be compared byte for byte with what
    arrived; group lengths, trailing padding (PS3.10 7.2) and file meta are left out for the same reason.
    """
    digest = hashlib.sha256()
    dataset = dcmread(path)
    _add(digest, dataset, big_endian=not dataset.original_encoding[1])
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", dataset: Dataset, *, big_endian: bool) -> None:
    for element in dataset:
        if element.tag.element == 0 or element.tag == TRAILING_PADDING:
            continue
        digest.update(f"{element.tag:08x}".encode())
        if element.VR == "SQ":
            for item in element.value:
                digest.update(b"item")
                _add(digest, item, big_endian=big_endian)
        else:
            value = element.value
            if big_endian and element.VR == "OW":
                swapped = bytearray(len(value))  # senders turn big endian words into little endian ones
                swapped[0::2], swapped[1::2] = value[1::2], value[0::2]
                value = bytes(swapped)
            digest.update(value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape"))


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def archived(volumes: list[Path]) -> dict[str, Path]:
    """SOP Instance UID -> file in the readable trees of these volumes."""
    found = (path for volume in volumes for path in (volume / "archive").rglob("*.dcm"))
    return {path.stem.split("~")[0]: path for path in found}
