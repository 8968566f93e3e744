"""What may be told of an error: its kind and place, never its message, which may name a patient or a path."""

import os
import traceback


def place_of(error: BaseException) -> str:
    """Kind and place of an unforeseen error."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return type(error).__name__ + where
