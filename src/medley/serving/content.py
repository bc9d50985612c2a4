"""Messages as clients send them -> documents; pictures <-> data addresses.

Pictures come as data addresses. An http address is fetched only from a host that was named when
the server was started, and nothing that a request names is ever read from this machine's disk.
"""

from __future__ import annotations

import base64
import binascii
import io
import urllib.parse
from collections.abc import Sequence
from typing import Any

from PIL import Image

from medley.document import Document, DocumentError, Part, Picture, Turn
from medley.images import ImageError, read_image
from medley.images.remote import fetch_image, is_address
from medley.serving.limits import Limits, RequestError

_DATA = "data:"
_TEXT_KINDS = ("text", "input_text", "output_text")
_IMAGE_KINDS = ("image_url", "input_image")


def document_of(messages: Sequence[Any], limits: Limits) -> Document:
    """A talk that ends with the user's turn. A system's text joins the first user turn; turns of
    one role that follow each other are one.

    Raises RequestError with the place of what is wrong.
    """
    turns: list[tuple[str, list[Part]]] = []
    told: list[Part] = []
    pictures = 0
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise RequestError(f"{place} is no object", param=place)
        role = message.get("role")
        parts = list(_parts(message.get("content"), f"{place}.content", limits))
        # Our own answers, sent back as they came, hold their pictures beside the words.
        if not any(isinstance(part, Picture) for part in parts) and message.get("images"):
            parts += _parts(message["images"], f"{place}.images", limits)
        pictures += sum(isinstance(part, Picture) for part in parts)
        if pictures > limits.pictures:
            raise RequestError(
                f"more than {limits.pictures} pictures, which is the limit", param="messages"
            )
        if role in ("system", "developer"):
            if turns:
                raise RequestError(f"{place}: a system message stands before the talk", param=place)
            told += [*parts, "\n"]
        elif role in ("user", "assistant"):
            if turns and turns[-1][0] == role:
                turns[-1][1].extend(["\n", *parts])
            else:
                turns.append((role, parts))
        else:
            raise RequestError(
                f"{place}.role is {role!r}, expected system, user or assistant", param=place
            )
    if not turns or turns[-1][0] != "user":
        raise RequestError("the last message has to be the user's", param="messages")
    if turns[0][0] != "user":
        raise RequestError("the talk has to begin with the user", param="messages")
    turns[0][1][:0] = told
    try:
        return Document(tuple(Turn(role, tuple(parts)) for role, parts in turns))
    except DocumentError as error:
        raise RequestError(str(error), param="messages") from error


def _parts(content: Any, place: str, limits: Limits) -> Sequence[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return [_text(content, place)]
    if not isinstance(content, list):
        raise RequestError(f"{place} is neither text nor a list of parts", param=place)
    found: list[Part] = []
    for number, part in enumerate(content):
        own = f"{place}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXT_KINDS and isinstance(part.get("text"), str):
            found.append(_text(part["text"], own))
        elif kind in _IMAGE_KINDS:
            address = part.get("image_url")
            address = address.get("url") if isinstance(address, dict) else address
            found.append(Picture(image=picture_of(address, own, limits)))
        else:
            raise RequestError(f"{own}: type is {kind!r}, expected text or image_url", param=own)
    return found


def _text(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{place}: half of a character ({error.reason})", param=place) from error
    return text


def picture_of(address: Any, place: str, limits: Limits) -> Image.Image:
    """A data address, or one of a host that was allowed, as RGB. Raises RequestError."""
    if not isinstance(address, str) or not address:
        raise RequestError(f"{place}: a picture without an address", param=place)
    try:
        if address.startswith(_DATA):
            return read_small(_bytes_of(address, place), "the picture", limits)
        host = urllib.parse.urlsplit(address).hostname if is_address(address) else None
        if host is not None and host in limits.hosts:
            return fetch_image(address, limits.body)
    except (ImageError, ValueError) as error:
        raise RequestError(f"{place}: {error}", param=place) from error
    raise RequestError(
        f"{place}: send the picture as a data address (data:image/png;base64,…); addresses are "
        "fetched only from hosts that the server's owner has named",
        param=place,
    )


def _bytes_of(address: str, place: str) -> bytes:
    head, comma, body = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RequestError(f"{place}: expected data:image/…;base64,…", param=place)
    return decoded(body, place)


def decoded(text: Any, place: str) -> bytes:
    """Raises RequestError for what is no base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise RequestError(f"{place}: not base64 ({error})", param=place) from error


def read_small(data: bytes, name: str, limits: Limits) -> Image.Image:
    """Raises ImageError for what is no picture, and for one with too many pixels, before they are
    unpacked."""
    try:
        with Image.open(io.BytesIO(data)) as header:
            pixels = header.width * header.height
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}") from error
    except (OSError, ValueError, SyntaxError):
        pixels = 0  # DICOM, or nothing: the reader says which
    if pixels > limits.pixels:
        raise ImageError(f"{name}: {pixels} pixels, the limit is {limits.pixels}")
    return read_image(io.BytesIO(data), name)


def png_base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def data_address(image: Image.Image) -> str:
    return f"data:image/png;base64,{png_base64(image)}"
