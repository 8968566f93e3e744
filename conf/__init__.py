"""Settings: one frozen model read from one TOML file, and the files the product ships beside it."""

VERSION = "0.1.0"
