"""What this node knows: the catalogue and the log, in LMDB."""
