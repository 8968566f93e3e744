"""UIDs: ours, and what is one."""

import re
from typing import Final

from conf import VERSION

IMPLEMENTATION_CLASS_UID: Final = "2.25.191406830207312346718502370431184295617"
IMPLEMENTATION_VERSION: Final = f"TANDEM_{VERSION}"[:16]
APPLICATION_CONTEXT: Final = "1.2.840.10008.3.1.1.1"
UID_CHARS_MAX: Final = 64
_STRICT: Final = re.compile(r"[0-9]+(\.[0-9]+)*")
_LENIENT: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")


def is_uid(text: str, *, lenient: bool = False) -> bool:
    """PS3.5 9.1: at most 64 characters, numeric components. Leading zeros occur in the field and do no harm. `lenient`:
    whatever makes a safe name, as other archives take it."""
    if lenient:
        return _LENIENT.fullmatch(text) is not None
    return len(text) <= UID_CHARS_MAX and _STRICT.fullmatch(text) is not None
