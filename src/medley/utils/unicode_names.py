"""File names in Unicode's normal forms.

macOS writes an accented letter as two characters (NFD), other systems as one (NFC). A list of files
and a disk may differ in it.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator


def normal_forms(name: str) -> Iterator[str]:
    """The name as it is, then its other normal forms."""
    yield name
    if not name.isascii():
        for form in ("NFC", "NFD"):
            other = unicodedata.normalize(form, name)
            if other != name:
                yield other


def existing_name(name: str) -> str:
    """The form of the name under which a file exists; else the name itself."""
    for form in normal_forms(name):
        if os.path.exists(form):  # noqa: PTH110  # also False for a name with a NUL character
            return form
    return name
