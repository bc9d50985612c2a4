"""Pictures at an address: only where the user allowed the network, and never more than fits."""

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

LARGEST = 64 << 20  # bytes of a picture that is fetched
TIMEOUT = 30.0  # seconds without an answer
WHOLE_TIME = 120.0  # seconds for all of it
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)


def is_address(name: str) -> bool:
    return _ADDRESS.match(name) is not None


class HttpOnlyRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no address to another kind of one (ftp, file), nor to one that is not allowed."""

    def __init__(self, allowed: Callable[[str], bool] = is_address) -> None:
        self.allowed = allowed

    def redirect_request(self, *arguments: Any) -> Any:
        request, *_, url = arguments
        if not is_address(url):
            raise ImageError(
                f"{request.full_url}: leads to {url}, which is no http or https address"
            )
        if not self.allowed(url):
            raise ImageError(f"{request.full_url}: leads to {url}, which is not allowed")
        return super().redirect_request(*arguments)


def on_hosts(address: str, hosts: Collection[str]) -> bool:
    """Whether an address is on one of some hosts: `name` for its usual ports, or `name:port`."""
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return False
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    if host is None or usual is None or parts.username is not None:
        return False
    known = {name.lower() for name in hosts}
    return f"{host}:{port or usual}" in known or (port in (None, usual) and host in known)


def fetch_image(
    address: str, largest: int = LARGEST, whole_time: float = WHOLE_TIME
) -> Image.Image:
    """The picture at an http or https address, as RGB. Raises ImageError as `fetch_bytes` does,
    and for what is no picture."""
    data = fetch_bytes(address, largest, whole_time)
    return read_image(io.BytesIO(data), address.partition("?")[0])


def fetch_bytes(
    address: str,
    largest: int = LARGEST,
    whole_time: float = WHOLE_TIME,
    allowed: Callable[[str], bool] = is_address,
) -> bytes:
    """What lies at an http or https address; `allowed` is asked of each address it leads to.

    Raises ImageError for what cannot be had, is larger than `largest` bytes, takes longer than
    `whole_time` seconds, or is a volume.
    """
    if not is_address(address):
        raise ImageError(f"{address}: not an http or https address")
    name = address.partition("?")[0]
    if name.lower().endswith((".nii", ".nii.gz")):  # unpacks to gigabytes
        raise ImageError(f"{address}: a volume; fetch it yourself and name the file")
    opener = urllib.request.build_opener(HttpOnlyRedirects(allowed))
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
    return bytes(data)
