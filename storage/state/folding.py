"""Texts as they are compared: names without regard to case, accents and width; dates and times without separators.

The indexes fold in the same way as matching does, so that what matches is always among what they find.
"""

import re
import unicodedata
from functools import lru_cache


@lru_cache(maxsize=65536)
def folded(text: str) -> str:
    """`fold` for what comes again and again: names."""
    return fold(text)


def fold(text: str) -> str:
    """Without case and width, and without the accents of Latin and Greek letters. In other scripts marks make other
    letters: が isn't か, й isn't и."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    if plain.isascii():
        return plain
    kept: list[str] = []
    bare = False  # the letter before may lose its marks
    for char in plain:
        if not unicodedata.combining(char):
            bare = char.isascii() or _is_latin_or_greek(char)
            kept.append(char)
        elif not bare:
            kept.append(char)
    return "".join(kept)


def _is_latin_or_greek(char: str) -> bool:
    code = ord(char)
    return code < 0x250 or 0x370 <= code < 0x400 or 0x1E00 <= code < 0x2000


def trimmed(group: str) -> str:
    """A group of a person name without blanks around its components, and without empty ones at its end."""
    return "^".join(part.strip() for part in group.split("^")).rstrip("^ ")


def words_of(text: str) -> list[str]:
    """The words of a folded name."""
    return [word for word in re.split(r"[\^=\s,.-]+", text) if word]


def digits_of(text: str) -> str:
    """A date or time without the separators of ACR-NEMA, and without an offset from UTC."""
    return re.sub(r"[:\s]", "", re.sub(r"^(\d{4})\.(\d\d)\.(\d\d)", r"\1\2\3", re.sub(r"[+-]\d{4}$", "", text.strip())))
