"""The DIMSE services over TCP: they decode, ask the archive, and encode."""
