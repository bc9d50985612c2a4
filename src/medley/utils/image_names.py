"""What names of images may be instead of paths, and hints for names that are not found."""

from __future__ import annotations

import re


def is_data_url(name: str) -> bool:
    """Whether a name is the content of a file instead."""
    return name.startswith("data:")


def image_name_hint(name: str) -> str:
    """What to do about an image name that is an address, or a path of Windows."""
    if is_data_url(name):
        return " Save the embedded image to a file."
    if re.search(r"(https?|s3|gs|hf|file|ftp):/", name):
        return " Images are not downloaded here. Download it, and name the file."
    return " Write / in place of \\ in the path." if "\\" in name else ""
