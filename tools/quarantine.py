"""Sends a quarantined file to its node again, byte for byte."""

from pathlib import Path

from pydicom.filereader import read_file_meta_info

from conf.settings import Settings
from tools.dicom_client import AssociationFailed, DicomClient, Object

TIMEOUT_S = 60.0


class RestoreFailed(Exception):
    """One line for the operator."""


def restore(file: Path, settings: Settings) -> None:
    """Raises RestoreFailed."""
    raw = file.read_bytes()
    try:
        meta = read_file_meta_info(file)
        start = 144 + int(meta.FileMetaInformationGroupLength)
        item = Object(
            str(meta.MediaStorageSOPClassUID),
            str(meta.MediaStorageSOPInstanceUID),
            str(meta.TransferSyntaxUID),
            raw[start:],
        )
    except Exception as error:  # whatever pydicom makes of a file that may be damaged
        raise RestoreFailed(f"not a readable DICOM file: {type(error).__name__}") from error
    host = settings.cluster.vips[0].split("/")[0] if settings.cluster and settings.cluster.vips else "127.0.0.1"
    context = [(item.sop_class, item.transfer_syntax)]
    try:
        with DicomClient(host, settings.dicom.port, settings.dicom.aet, context, TIMEOUT_S) as client:
            status = client.store(item)
    except (OSError, AssociationFailed) as error:
        raise RestoreFailed(f"{host} doesn't take it: {error}") from error
    if status:
        raise RestoreFailed(f"refused with status 0x{status:04X}")
