"""Pictures at an address: only where the user allowed the network, and never more than fits."""

from __future__ import annotations

import http.client
import io
import re
import time
import urllib.error
import urllib.request
from typing import Any

from PIL import Image

from medley.images import ImageError, read_image

LARGEST = 64 << 20  # bytes of a picture that is fetched
TIMEOUT = 30.0  # seconds without an answer
WHOLE_TIME = 120.0  # seconds for all of it
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)


def is_address(name: str) -> bool:
    return _ADDRESS.match(name) is not None


class OnlyHttp(urllib.request.HTTPRedirectHandler):
    """Follows no address to another kind of one (ftp, file)."""

    def redirect_request(self, *arguments: Any) -> Any:
        request, *_, url = arguments
        if not is_address(url):
            raise ImageError(
                f"{request.full_url}: leads to {url}, which is no http or https address"
            )
        return super().redirect_request(*arguments)


def fetch_image(
    address: str, largest: int = LARGEST, whole_time: float = WHOLE_TIME
) -> Image.Image:
    """The picture at an http or https address, as RGB.

    Raises ImageError for one that cannot be had, is larger than `largest` bytes, takes longer than
    `whole_time` seconds, or is none.
    """
    if not is_address(address):
        raise ImageError(f"{address}: not an http or https address")
    name = address.partition("?")[0]
    if name.lower().endswith((".nii", ".nii.gz")):  # unpacks to gigabytes
        raise ImageError(f"{address}: a volume; fetch it yourself and name the file")
    opener = urllib.request.build_opener(OnlyHttp)
    until = time.monotonic() + whole_time
    data = bytearray()
    try:
        with opener.open(address, timeout=TIMEOUT) as answer:
            while piece := answer.read1(1 << 16):
                data += piece
                if len(data) > largest:
                    raise ImageError(
                        f"{address}: larger than {largest >> 20} MB, which is the limit"
                    )
                if time.monotonic() > until:
                    raise ImageError(f"{address}: not here after {whole_time:.0f} s")
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{address}: cannot be fetched ({error})") from error
    return read_image(io.BytesIO(bytes(data)), name)
