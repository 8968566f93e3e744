"""What the world talks to: DICOM now; DICOMweb, the web page and the file share later."""
