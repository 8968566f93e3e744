"""Sends a quarantined file to its node again, byte for byte."""

from pathlib import Path

from conf.settings import Settings
from tools.dicom_client import AssociationFailed, DicomClient
from tools.dicom_files import NotAnInstance, read_object
from tools.settings_option import dicom_host

TIMEOUT_S = 60.0


class RestoreFailed(Exception):
    """One line for the operator."""


def restore(file: Path, settings: Settings) -> None:
    """Raises RestoreFailed."""
    try:
        item = read_object(file)
    except (NotAnInstance, OSError) as error:
        raise RestoreFailed(str(error)) from error
    host = dicom_host(settings)
    context = [(item.sop_class, item.transfer_syntax)]
    try:
        with DicomClient(host, settings.dicom.port, settings.dicom.aet, context, TIMEOUT_S) as client:
            status = client.store(item)
    except (OSError, AssociationFailed) as error:
        raise RestoreFailed(f"{host} doesn't take it: {error}") from error
    if status:
        raise RestoreFailed(f"refused with status 0x{status:04X}")
