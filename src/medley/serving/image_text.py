"""Images in the text of a message: Markdown with a data URL, and the note of an image alone.

Most clients keep only the text of a response. Markdown shows them the image, and brings it back
with the next request. A note names the image by its content, so that the server recognizes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from medley.serving.generated_images import content_hash
from medley.utils.html import data_url

_MAX_ALT = 1000  # characters between the brackets of a Markdown image
_ADDRESS = re.compile(
    r"""\]\(\s*<?(?P<url>data:image/[^\s()<>]+)>?(?:\s+"[^"\n]*")?\s*\)"""
    r"""|(?P<note>\[image (?P<hash>[0-9a-f]{32})\])"""
)
_BASE64_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w=.-]+)*;base64,[A-Za-z0-9+/_=%-]+", re.ASCII)


@dataclass(frozen=True)
class ImageReference:
    """An image in a text: its data URL, or the content hash of a note with the note itself."""

    url: str = ""
    content_hash: str = ""
    note: str = ""


def to_markdown(image: Image.Image) -> str:
    """An image as Markdown. Without blanks around it, so that `split_images` is the inverse."""
    return f"![image]({data_url(image)})"


def to_note(image: Image.Image) -> str:
    """A note in place of an image in a response without text, which would be a blank line."""
    return f"[image {content_hash(image)}]"


def split_images(text: str) -> Iterator[str | ImageReference]:
    """Yields the texts and the images of a text in their order, without empty texts.

    A Markdown image with another address than a base64 data URL stays part of the text. The time
    is linear in the length of the text. The parts are not stored: a text may have a million.
    """
    end = 0
    for match in _ADDRESS.finditer(text):
        start = match.start()
        if match["note"]:
            reference = ImageReference(content_hash=match["hash"], note=match["note"])
        else:
            start = text.rfind("![", max(end, start - _MAX_ALT), start)
            if start < 0 or not _BASE64_URL.fullmatch(match["url"]):
                continue
            reference = ImageReference(url=match["url"])
        if start > end:
            yield text[end:start]
        yield reference
        end = match.end()
    if end < len(text):
        yield text[end:]


def count_markdown_images(text: str) -> int:
    """The number of images of a text that have to be decoded."""
    return sum(isinstance(part, ImageReference) and bool(part.url) for part in split_images(text))


def remove_notes(text: str) -> str:
    """A text whose images are beside it."""
    return _ADDRESS.sub(lambda match: "" if match["note"] else match[0], text)
