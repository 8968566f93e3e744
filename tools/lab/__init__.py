"""A pair on this machine, in network namespaces."""
