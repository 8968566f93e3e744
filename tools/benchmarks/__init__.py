"""Measured beside what people use."""
