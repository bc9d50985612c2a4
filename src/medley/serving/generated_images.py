"""Image codes of the images that this server has generated, by the content of the image.

A client sends an image of an earlier response back as pixels. Encoding them again gives other
image codes than those that the model generated; here are the original ones.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from PIL import Image

MAX_BYTES = 64 << 20  # of all image codes: tens of thousands of images
_ENTRY_BYTES = 300  # of the keys and the containers of one entry


def content_hash(image: Image.Image) -> str:
    """The name of an image by its pixels: 32 hexadecimal digits."""
    digest = hashlib.blake2b(f"{image.mode} {image.size} ".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


class GeneratedImages:
    """Image codes by token space and content hash; the least recently used are dropped first.

    May be used by several threads.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes, self.size = max_bytes, 0
        self._codes: OrderedDict[tuple[str, str], array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, token_space: str, name: str, codes: Sequence[int]) -> None:
        """Stores the codes of an image by its content hash."""
        stored = array("i", codes)
        with self._lock:
            self._drop(token_space, name)
            self._codes[token_space, name] = stored
            self.size += _size_of(stored)
            while self.size > self.max_bytes:
                self._drop(*next(iter(self._codes)))

    def get(self, token_space: str, name: str) -> tuple[int, ...] | None:
        """The codes of an image; None if this server has not generated it, or has dropped it."""
        with self._lock:
            stored = self._codes.get((token_space, name))
            if stored is None:
                return None
            self._codes.move_to_end((token_space, name))
            return tuple(stored)

    def _drop(self, token_space: str, name: str) -> None:
        stored = self._codes.pop((token_space, name), None)
        if stored is not None:
            self.size -= _size_of(stored)


def _size_of(codes: array[int]) -> int:
    return len(codes) * codes.itemsize + _ENTRY_BYTES
