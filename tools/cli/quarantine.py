"""Sends a quarantined file to its node again, byte for byte."""

from pathlib import Path

from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info

from conf.settings import Settings
from tools.cli.dicom_client import AssociationFailed, DicomClient, Unreadable
from tools.cli.dicom_files import NotAnInstance, open_object
from tools.cli.importing import CALLING
from tools.cli.options import dicom_host, login

TIMEOUT_S = 60.0
DUPLICATE = 0x0111


class RestoreFailed(Exception):
    """One line for the operator."""


def restore(file: Path, settings: Settings) -> None:
    """Raises RestoreFailed."""
    try:
        item = open_object(file)
    except (NotAnInstance, OSError) as error:
        raise RestoreFailed(str(error)) from error
    host = dicom_host(settings)
    context = [(item.sop_class, item.transfer_syntax)]
    try:
        dicom = settings.dicom
        with DicomClient(
            host, dicom.port, dicom.aet, context, TIMEOUT_S, calling=_sender(file), user=login()
        ) as client:
            status = client.store(item)
    except Unreadable as error:
        raise RestoreFailed(str(error)) from error
    except (OSError, AssociationFailed) as error:
        raise RestoreFailed(f"{host} doesn't take it: {error}") from error
    if status == DUPLICATE:
        raise RestoreFailed("another version is stored, from another sender or study; `tandem delete` that one first")
    if status:
        raise RestoreFailed(f"refused with status 0x{status:04X}")


def _sender(file: Path) -> str:
    """AE title that sent it, as which it may replace what the same sender has sent since."""
    try:
        return str(read_file_meta_info(str(file)).get("SourceApplicationEntityTitle", "")) or CALLING
    except (InvalidDicomError, OSError, ValueError):
        return CALLING
