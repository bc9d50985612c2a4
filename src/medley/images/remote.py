"""Images at a URL, with limits on size, time and redirects.

Callers use this only if the user allows network access.
"""

from __future__ import annotations

import http.client
import io
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection
from typing import Any

from PIL import Image

from medley.images.preprocess import ImageError, read_image

MAX_BYTES = 64 << 20
TIMEOUT = 30.0  # seconds without data
MAX_SECONDS = 120.0  # for the complete response
_URL = re.compile(r"https?://", re.IGNORECASE)


def is_http_url(name: str) -> bool:
    return _URL.match(name) is not None


class HttpOnlyRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to allowed http and https URLs only (not to ftp or file)."""

    def __init__(self, allowed: Callable[[str], bool] = is_http_url) -> None:
        self.allowed = allowed

    def redirect_request(self, *arguments: Any) -> Any:
        request, *_, url = arguments
        if not is_http_url(url):
            raise ImageError(
                f"{request.full_url}: Redirects to {url}, which is not an http or https URL."
            )
        if not self.allowed(url):
            raise ImageError(f"{request.full_url}: Redirects to {url}, which is not allowed.")
        return super().redirect_request(*arguments)


def is_allowed_host(url: str, hosts: Collection[str]) -> bool:
    """Whether the host of a URL is listed: as `name` for its default port, or as `name:port`."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return False
    default_port = {"http": 80, "https": 443}.get(parts.scheme)
    if host is None or default_port is None or parts.username is not None:
        return False
    allowed = {name.lower() for name in hosts}
    has_default_port = port in (None, default_port)
    return f"{host}:{port or default_port}" in allowed or (has_default_port and host in allowed)


def fetch_image(
    url: str, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS
) -> Image.Image:
    """The image at an http or https URL, as RGB.

    Raises ImageError for the reasons of `fetch_bytes`, and if the response is not an image.
    """
    data = fetch_bytes(url, max_bytes, max_seconds)
    return read_image(io.BytesIO(data), url.partition("?")[0])


def fetch_bytes(
    url: str,
    max_bytes: int = MAX_BYTES,
    max_seconds: float = MAX_SECONDS,
    allowed: Callable[[str], bool] = is_http_url,
) -> bytes:
    """The response body of an http or https URL. `allowed` is called with each redirect's URL.

    Raises ImageError if the request fails, the body exceeds `max_bytes` or `max_seconds`, or the
    URL is that of a volume.
    """
    if not is_http_url(url):
        raise ImageError(f"{url}: Not an http or https URL.")
    name = url.partition("?")[0]
    if name.lower().endswith((".nii", ".nii.gz")):  # decompresses to gigabytes
        raise ImageError(f"{url}: Volumes are not fetched. Download it and pass the file name.")
    opener = urllib.request.build_opener(HttpOnlyRedirects(allowed))
    deadline = time.monotonic() + max_seconds
    data = bytearray()
    try:
        with opener.open(url, timeout=TIMEOUT) as response:
            while chunk := response.read1(1 << 16):
                data += chunk
                if len(data) > max_bytes:
                    raise ImageError(
                        f"{url}: The response is too large (expected at most {max_bytes >> 20} MB)."
                    )
                if time.monotonic() > deadline:
                    raise ImageError(f"{url}: Not complete after {max_seconds:.0f} s.")
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{url}: Cannot fetch the image ({error}).") from error
    return bytes(data)
