"""Pictures at an address: only where the user allowed the network, and never more than fits."""

from __future__ import annotations

import io
import re
import urllib.error
import urllib.request
from typing import Any

from PIL import Image

from medley.images import ImageError, read_image

LARGEST = 64 << 20  # bytes of a picture that is fetched
TIMEOUT = 30.0  # seconds without an answer
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)


def is_address(name: str) -> bool:
    return _ADDRESS.match(name) is not None


class _OnlyHttp(urllib.request.HTTPRedirectHandler):
    """Follows no address to another kind of one (ftp, file)."""

    def redirect_request(self, *arguments: Any) -> Any:
        request, *_, url = arguments
        if not is_address(url):
            raise ImageError(
                f"{request.full_url}: leads to {url}, which is no http or https address"
            )
        return super().redirect_request(*arguments)


def fetch_image(address: str, largest: int = LARGEST) -> Image.Image:
    """The picture at an http or https address, as RGB.

    Raises ImageError for one that cannot be had, is larger than `largest` bytes, or is none.
    """
    if not is_address(address):
        raise ImageError(f"{address}: not an http or https address")
    opener = urllib.request.build_opener(_OnlyHttp)
    try:
        with opener.open(address, timeout=TIMEOUT) as answer:
            data = answer.read(largest + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ImageError(f"{address}: cannot be fetched ({error})") from error
    if len(data) > largest:
        raise ImageError(f"{address}: larger than {largest >> 20} MB, which is the limit")
    return read_image(io.BytesIO(data), address.partition("?")[0])
