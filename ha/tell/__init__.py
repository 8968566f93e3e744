"""Alerts: what is told, when, and by which way."""
