"""Bytes: volumes, spool, placement, copies."""
