"""The settings in force. They are replaced as a whole when they are read anew; who needs one looks when he needs it."""

from conf.settings import DicomSettings


class Live:
    def __init__(self, dicom: DicomSettings) -> None:
        self.dicom = dicom
