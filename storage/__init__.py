"""What is kept: volumes, index, log, replication. Imports neither gateway nor ha."""
