"""Healing, scrub, tidying, recovery, quarantine."""
