"""What can be asked of an archive, without a protocol."""
