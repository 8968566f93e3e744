"""Processes for what may hang, crash or burn a core: reading odd data sets, decoding pixels."""
