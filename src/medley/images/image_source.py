"""One image of a list: in a file, in a tar, or embedded in a row of a Parquet or Arrow file."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import BinaryIO

from PIL import Image

from medley.images.embedded import read_embedded
from medley.images.formats import ImageError
from medley.images.preprocess import Frame, count_frames, open_image, read_image
from medley.utils.unicode_names import existing_name


@dataclass(frozen=True)
class ImageSource:
    """An image in a file, in a tar (`offset`, `length`), or in a table (`column`, `row`).

    `name` identifies the image in outputs and errors. `element` is its position in the row's list.
    """

    name: str
    file: str
    frame: Frame | None = None
    offset: int | None = None
    length: int = 0
    column: str | None = None
    row: int = 0
    element: int | None = None

    def open(self, exif_orientation: bool = False) -> Image.Image:
        """The image as RGB. Raises ImageError."""
        if self._is_file:
            return open_image(self.file, self.frame, exif_orientation)
        with self._data() as data:
            # Without the frame number, because the suffix determines the format.
            name = self.name.removesuffix(f"#{self.frame}")
            return read_image(data, name, self.frame, exif_orientation)

    def frames(self) -> list[ImageSource]:
        """One source for each frame of the file, named `name#0`, `name#1` and so on.

        An unreadable file stays one source; opening it raises the error.
        """
        try:
            with self._data() as data:
                count = count_frames(data, self.name)
        except Exception:
            count = 1
        if count == 1:
            return [self]
        return [replace(self, name=f"{self.name}#{i}", frame=i) for i in range(count)]

    @property
    def _is_file(self) -> bool:
        return self.offset is None and self.column is None

    def _data(self) -> BinaryIO:
        if self._is_file:
            return open(existing_name(self.file), "rb")
        if self.column is not None:
            data = read_embedded(self.file, self.column, self.row, self.element)
            if data is None:
                raise ImageError(f"{self.name}: The image has no bytes.")
            return io.BytesIO(data)
        with open(self.file, "rb") as tar:
            tar.seek(self.offset or 0)
            return io.BytesIO(tar.read(self.length))
