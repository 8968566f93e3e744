"""The attributes kept in the catalogue for queries, by level (PS3.4 C.6.1, C.6.2): keyword -> tag."""

from typing import Final

PATIENT: Final = {
    "PatientName": 0x00100010,
    "PatientID": 0x00100020,
    "IssuerOfPatientID": 0x00100021,
    "PatientBirthDate": 0x00100030,
    "PatientSex": 0x00100040,
    "OtherPatientIDs": 0x00101000,
    "PatientComments": 0x00104000,
}
STUDY: Final = {
    "StudyInstanceUID": 0x0020000D,
    "StudyDate": 0x00080020,
    "StudyTime": 0x00080030,
    "AccessionNumber": 0x00080050,
    "StudyID": 0x00200010,
    "ReferringPhysicianName": 0x00080090,
    "StudyDescription": 0x00081030,
    "PatientAge": 0x00101010,
    "PatientSize": 0x00101020,
    "PatientWeight": 0x00101030,
    "InstitutionName": 0x00080080,
}
SERIES: Final = {
    "SeriesInstanceUID": 0x0020000E,
    "Modality": 0x00080060,
    "SeriesNumber": 0x00200011,
    "SeriesDescription": 0x0008103E,
    "SeriesDate": 0x00080021,
    "SeriesTime": 0x00080031,
    "BodyPartExamined": 0x00180015,
    "ProtocolName": 0x00181030,
    "StationName": 0x00081010,
    "Manufacturer": 0x00080070,
    "PerformedProcedureStepStartDate": 0x00400244,
    "PerformedProcedureStepStartTime": 0x00400245,
}
IMAGE: Final = {
    "SOPInstanceUID": 0x00080018,
    "SOPClassUID": 0x00080016,
    "InstanceNumber": 0x00200013,
    "ContentDate": 0x00080023,
    "ContentTime": 0x00080033,
    "AcquisitionDate": 0x00080022,
    "AcquisitionTime": 0x00080032,
    "NumberOfFrames": 0x00280008,
    "Rows": 0x00280010,
    "Columns": 0x00280011,
    "BitsAllocated": 0x00280100,
}
# Of each row: how its texts were encoded.
OF_ALL: Final = {"SpecificCharacterSet": 0x00080005}
LEVELS: Final = {"PATIENT": PATIENT, "STUDY": STUDY, "SERIES": SERIES, "IMAGE": IMAGE}
ALL: Final = {**PATIENT, **STUDY, **SERIES, **IMAGE}
LAST_TAG: Final = max(ALL.values())
