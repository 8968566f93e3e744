"""DICOM itself, without input or output: PDUs, messages, data sets, matching of values, SOP classes."""
