"""The pictures of the page's talks, as files: a talk holds their names alone."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from medley.images import ImageError
from medley.serving.limits import Limits, RequestError
from medley.serving.pictures import read_unknown

SHOWN = 1024  # pixels of the longer side, at most, of what a browser shows
KEPT = 24 * 3600.0  # seconds that a file stays after it was last asked for
SWEEP = 600.0  # seconds between two looks for files that are older


@dataclass(frozen=True)
class Kept:
    """A picture: the file that the model reads, by the name it came with, and a PNG of it that is
    shown."""

    file: Path
    shown: Path
    name: str

    def read(self) -> bytes:
        """Raises RequestError for one that is not kept any more."""
        try:
            data = self.file.read_bytes()
            for path in {self.file, self.shown}:
                os.utime(path)
        except OSError as error:
            raise RequestError(
                f"{self.name} of this talk is not kept any more: clear the talk, and send it again"
            ) from error
        return data

    @property
    def image(self) -> Image.Image:
        """What is shown of it."""
        with Image.open(self.shown) as image:
            return image.convert("RGB")

    @property
    def address(self) -> str:
        """What is shown of it, as a data address."""
        return f"data:image/png;base64,{base64.b64encode(self.shown.read_bytes()).decode()}"


class Gallery:
    """Files of one folder, each content once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._swept = time.monotonic()

    def sent(self, file: str, limits: Limits) -> Kept:
        """A file that somebody dropped on the page. Raises RequestError for what is no picture."""
        path = Path(file)
        try:
            data = path.read_bytes()
            image = read_unknown(data, path.name, limits)
        except OSError as error:
            raise RequestError(f"{path.name}: {error.strerror}; drop it again") from error
        except ImageError as error:
            raise RequestError(str(error)) from error
        image.thumbnail((SHOWN, SHOWN))
        return Kept(self._keep(data, ""), self._png(image), path.name)

    def drawn(self, image: Image.Image) -> Kept:
        path = self._png(image)
        return Kept(path, path, "a drawn picture")

    def write(self, name: str, text: str) -> Path:
        """A file for the reader to take away."""
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def _png(self, image: Image.Image) -> Path:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return self._keep(buffer.getvalue(), ".png")

    def _keep(self, data: bytes, suffix: str) -> Path:
        path = self.folder / f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
        with self._lock:
            if path.exists():
                os.utime(path)
            else:
                path.write_bytes(data)
            if time.monotonic() - self._swept > SWEEP:
                self._swept = time.monotonic()
                self._sweep()
        return path

    def _sweep(self) -> None:
        for path in self.folder.iterdir():
            if path.stat().st_mtime < time.time() - KEPT:
                path.unlink(missing_ok=True)
