"""Texts and pictures of somebody unknown: read within limits, and nothing but what was sent.

Pictures come as data addresses. An http address is fetched only from a host that was named when
the server was started, and nothing that a request names is ever read from this machine's disk.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import time
from typing import Any

from PIL import Image, UnidentifiedImageError

from medley.errors import UserError
from medley.images import medical
from medley.images.preprocess import ImageError, read_image, to_rgb
from medley.images.remote import fetch_bytes, is_address, on_hosts
from medley.serving.limits import Limits, RequestError
from medley.vqgan.image_tokenizer import ImageTokenizer

_DATA = "data:"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # beside DICOM
_SHOWN = 80  # characters of what was sent, in a message


class RequestReader:
    """What one request holds. Its pictures become the square that the model reads at once: the
    original may be a thousand times as large, and would wait with the request."""

    def __init__(self, limits: Limits, tokenizer: ImageTokenizer, most_characters: int) -> None:
        self.limits, self.tokenizer, self.left = limits, tokenizer, most_characters
        self.most = most_characters
        self.until = time.monotonic() + limits.seconds

    def refuse_many(self, pictures: int) -> None:
        """Before the first of them is unpacked."""
        if pictures > self.limits.pictures:
            raise RequestError(
                f"{pictures} pictures, the limit is {self.limits.pictures}", param="messages"
            )

    def text(self, text: str, place: str) -> str:
        """Raises RequestError for more characters than the model's context has room for, and for
        what is no Unicode."""
        self.left -= len(text)
        if self.left < 0:
            raise RequestError(
                f"{place}: more than {self.most} characters of text, which the model's context "
                "has no room for",
                param=place,
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{place}: half of a character ({error.reason})", param=place
            ) from error
        return text

    def address(self, address: Any, place: str) -> Image.Image:
        """The picture of a data address, or of an allowed host. Raises RequestError."""
        if not isinstance(address, str) or not address:
            raise RequestError(f"{place}: a picture without an address", param=place)
        if address.startswith(_DATA):
            head, comma, body = address.partition(",")
            if not comma or not head.endswith(";base64"):
                raise RequestError(f"{place}: expected data:image/…;base64,…", param=place)
            return self.base64(body, place)
        hosts = self.limits.hosts
        if not (is_address(address) and on_hosts(address, hosts)):
            raise RequestError(
                f"{place}: send the picture as a data address (data:image/png;base64,…); addresses "
                "are fetched only from hosts that the server's owner has named",
                param=place,
            )
        left = self.until - time.monotonic()
        try:
            data = fetch_bytes(address, self.limits.body, left, lambda to: on_hosts(to, hosts))
        except ImageError as error:
            raise RequestError(f"{place}: {error}", param=place) from error
        return self.picture(data, place)

    def base64(self, text: Any, place: str) -> Image.Image:
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError, TypeError) as error:
            raise RequestError(f"{place}: not base64 ({error})", param=place) from error
        return self.picture(data, place)

    def picture(self, data: bytes, place: str, name: str = "the picture") -> Image.Image:
        try:
            return self.tokenizer.square(read_unknown(data, name, self.limits))
        except ImageError as error:
            raise RequestError(f"{place}: {error}", param=place) from error


def shown(value: Any) -> str:
    """What was sent, for a message: never all of something long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def read_unknown(data: bytes, name: str, limits: Limits) -> Image.Image:
    """A picture as RGB, in its own size. Raises ImageError for what is no picture, and for one with
    too many pixels, before they are unpacked."""
    kind = medical.kind_of(io.BytesIO(data), name)
    if kind not in (None, "dicom"):
        raise ImageError(f"{name}: a volume; send one slice of it as a picture")
    try:
        if kind == "dicom":
            _refuse_large(medical.pixels_of_dicom(data), name, limits)
            if (frames := medical.count_frames(io.BytesIO(data), kind)) > 1:
                raise ImageError(f"{name}: holds {frames} frames; send the one that is meant")
            return read_image(io.BytesIO(data), name)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_large(image.width * image.height, name, limits)
            if image.format == "TIFF" and _has_second(image):
                raise ImageError(f"{name}: holds several frames; send the one that is meant")
            image.load()
            return to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        known = ", ".join((*FORMATS, "DICOM"))
        raise ImageError(f"{name}: not a picture in a format that is known ({known})") from error
    except (UserError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: broken picture ({reason})") from error


def _refuse_large(pixels: int, name: str, limits: Limits) -> None:
    if pixels > limits.pixels:
        raise ImageError(f"{name}: {pixels} pixels, the limit is {limits.pixels}")


def _has_second(image: Image.Image) -> bool:
    """Without counting them all, which a made-up file can make long."""
    with contextlib.suppress(EOFError):
        image.seek(1)
        return True
    image.seek(0)
    return False


def png_base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def data_address(image: Image.Image) -> str:
    return f"data:image/png;base64,{png_base64(image)}"
