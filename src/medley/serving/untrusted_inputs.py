"""Texts and images of untrusted requests, read within the server's limits.

Images are data URLs. An http URL is fetched only from an allowed host. No path in a request is
read from this machine's disk.
"""

from __future__ import annotations

import base64
import contextlib
import io
import re
import time
import urllib.parse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image

from medley.data.document import ImagePart
from medley.errors import UserError
from medley.images import medical
from medley.images.formats import ImageError, open_pillow
from medley.images.preprocess import apply_exif_orientation, read_image, to_rgb
from medley.images.remote import fetch_bytes, is_allowed_host, is_http_url
from medley.serving.error_responses import CodedError
from medley.serving.generated_images import GeneratedImages, content_hash
from medley.serving.limits import Limits, RequestError
from medley.vqgan.image_tokenizer import ImageTokenizer

if TYPE_CHECKING:
    from medley.serving.worker import EngineWorker

_BLANKS = b" \t\n\r\f\v"
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/_\s-]")
_QUOTED = 80  # characters of a value that an error message quotes


class RequestReader:
    """Reads the texts and images of one request; `where` names a part of it in errors.

    Images are resized at once to the square that the model reads: the original may be a thousand
    times as large, and would wait in the queue with the request.
    """

    def __init__(
        self,
        limits: Limits,
        tokenizer: ImageTokenizer,
        max_characters: int,
        generated_images: GeneratedImages | None = None,
    ) -> None:
        self.limits, self.tokenizer, self.max_characters = limits, tokenizer, max_characters
        self.generated_images = generated_images
        self._characters_left = max_characters
        self._codes: dict[str, tuple[int, ...]] = {}  # of generated images, by content hash
        self._deadline = time.monotonic() + limits.request_timeout

    @classmethod
    def of_worker(cls, worker: EngineWorker) -> RequestReader:
        """The reader of a request to one model."""
        tokenizer, images = worker.model.image_tokenizer, worker.generated_images
        return cls(worker.limits, tokenizer, worker.max_characters, images)

    def with_new_text(self) -> RequestReader:
        """The reader of another text of the same request, which is a prompt of its own."""
        own = RequestReader(self.limits, self.tokenizer, self.max_characters, self.generated_images)
        own._deadline = self._deadline
        return own

    def check_image_count(self, count: int, param: str = "messages") -> None:
        """Raises RequestError for too many images, before the first one is decoded."""
        if count > self.limits.max_images:
            raise RequestError(
                f"Too many images (got {count}, limit {self.limits.max_images}).", param=param
            )

    def text(self, text: str, where: str) -> str:
        """Returns the text.

        Raises RequestError if it cannot be encoded, or if the request's text cannot fit the
        model's context.
        """
        self._charge(len(text), where)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{where}: Unpaired surrogate in the text ({error.reason}).", param=where
            ) from error
        return text

    def _charge(self, count: int, where: str) -> None:
        """Counts characters, or image codes: a token each, and a token has a character at least."""
        self._characters_left -= count
        if self._characters_left < 0:
            raise CodedError(
                f"{where}: The prompt does not fit the model's context (limit "
                f"{self.max_characters} characters and image codes).",
                "context_length_exceeded",
                where,
            )

    def part_from_url(self, url: object, where: str) -> ImagePart:
        """The image of a data URL, or of an http URL of an allowed host. Raises RequestError."""
        return self.part_from_bytes(self._fetch(url, where), where)

    def part_from_base64(self, text: str, where: str) -> ImagePart:
        """The image of a base64 string. Raises RequestError."""
        return self.part_from_bytes(_decode(decode_base64, text, where), where)

    def part_from_bytes(self, data: bytes, where: str, name: str = "image") -> ImagePart:
        """The image of a file's contents, called `name` in errors. Raises RequestError.

        An image that this server has generated has its original image codes.
        """
        try:
            exif_orientation = self.tokenizer.preprocessing.exif_orientation
            image = read_untrusted_image(data, name, self.limits, exif_orientation)
        except ImageError as error:
            raise RequestError(f"{where}: {error}", param=where) from error
        if image.size == (self.tokenizer.size,) * 2:
            known = self.generated_image(content_hash(image), where)
            if known is not None:
                return known
        return ImagePart(image=self.tokenizer.square(image))

    def generated_image(self, name: str, where: str) -> ImagePart | None:
        """The image of a content hash; None if this server has not generated it.

        Raises RequestError if the request's image codes cannot fit the model's context.
        """
        if self.generated_images is None:
            return None
        # One tuple for all parts: a short note may name the image thousands of times.
        codes = self._codes.get(name)
        codes = codes or self.generated_images.get(self.tokenizer.fingerprint, name)
        if codes is None:
            return None
        self._charge(len(codes), where)
        self._codes[name] = codes
        return ImagePart(codes=codes)

    def _fetch(self, url: object, where: str) -> bytes:
        """The contents of the file at a URL."""
        if not isinstance(url, str) or not url:
            raise RequestError(f"{where}: The image has no URL.", param=where)
        url = url.strip()
        if url[:5].lower() == "data:":
            return _decode(decode_data_url, url, where)
        hosts = self.limits.image_hosts
        if not (is_http_url(url) and is_allowed_host(url, hosts)):
            raise RequestError(
                f"{where}: Unsupported image URL. Send the image as a data URL "
                "(data:image/png;base64,…). This server fetches images only from the hosts of "
                "--allowed_image_hosts.",
                param=where,
            )
        seconds = self._deadline - time.monotonic()
        try:
            return fetch_bytes(
                url, self.limits.max_body_bytes, seconds, lambda to: is_allowed_host(to, hosts)
            )
        except ImageError as error:
            raise RequestError(f"{where}: {error}", param=where) from error


def _decode(decode: Callable[[str], bytes], text: str, where: str) -> bytes:
    try:
        return decode(text)
    except ValueError as error:
        raise CodedError(f"{where}: {error}", "invalid_base64", where) from error


def decode_data_url(url: str) -> bytes:
    """The contents of a base64 data URL. Its media type is ignored: the contents define the format.

    Raises ValueError with the reason.
    """
    header, comma, data = url.partition(",")
    if not comma or "base64" not in [p.strip().lower() for p in header.split(";")[1:]]:
        raise ValueError("Invalid data URL (expected data:image/png;base64,…).")
    return decode_base64(urllib.parse.unquote(data) if "%" in data else data)


def decode_base64(text: str) -> bytes:
    """Decodes base64 as browsers do, and its URL-safe alphabet: blanks and padding are optional.

    Raises ValueError that names the first invalid character.
    """
    try:
        data = text.encode("ascii").rstrip(b"=" + _BLANKS)
        invalid = _NOT_BASE64.search(data)
        position = -1 if invalid is None else invalid.start()
    except UnicodeEncodeError as error:
        position = error.start
    if position >= 0:
        raise ValueError(f"Invalid base64 (character {text[position]!r} at position {position}).")
    data = data.translate(_URL_SAFE, _BLANKS)
    if len(data) % 4 == 1:
        raise ValueError(f"Invalid base64 (truncated after {len(data)} characters).")
    return base64.b64decode(data + b"=" * (-len(data) % 4))


def repr_short(value: Any) -> str:
    """`repr` for an error message, truncated."""
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"


def read_untrusted_image(
    data: bytes, name: str, limits: Limits, exif_orientation: bool = False
) -> Image.Image:
    """The image of a file's contents as RGB, in its own size.

    Raises ImageError for other contents, and for too many pixels before they are decoded.
    """
    kind = medical.detect_format(io.BytesIO(data), name)
    if kind not in (None, "dicom"):
        raise ImageError(f"{name}: Volumes are not supported. Send one slice as an image.")
    try:
        if kind == "dicom":
            _check_pixels(medical.count_dicom_pixels(data), name, limits)
            if (frames := medical.count_frames(io.BytesIO(data), kind)) > 1:
                raise ImageError(f"{name}: Contains {frames} frames. Send one frame.")
            return read_image(io.BytesIO(data), name)
        with open_pillow(io.BytesIO(data), name) as image:
            _check_pixels(image.width * image.height, name, limits)
            if image.format == "TIFF" and _has_second_frame(image):
                raise ImageError(f"{name}: Contains several frames. Send one frame.")
            image.load()
            return to_rgb(apply_exif_orientation(image) if exif_orientation else image)
    except ImageError:
        raise
    except (UserError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # A corrupt file may raise any exception in a decoder.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: Corrupt image ({reason}).") from error


def _check_pixels(pixels: int, name: str, limits: Limits) -> None:
    if pixels > limits.max_pixels:
        raise ImageError(f"{name}: Too many pixels (got {pixels}, limit {limits.max_pixels}).")


def _has_second_frame(image: Image.Image) -> bool:
    """Whether a TIFF has several frames; a crafted file can make counting them very slow."""
    with contextlib.suppress(EOFError):
        image.seek(1)
        return True
    image.seek(0)
    return False
