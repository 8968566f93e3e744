"""The share as a mounted file system."""
