"""The pictures of the page's talks, as files: a talk holds their names alone."""

from __future__ import annotations

import atexit
import base64
import hashlib
import io
import os
import secrets
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
from PIL import Image

from medley.images.preprocess import ImageError
from medley.serving.limits import Limits, RequestError
from medley.serving.untrusted_inputs import read_unknown

SHOWN = 1000  # pixels of the longer side, at most, of what a browser shows
KEPT = 24 * 3600.0  # seconds that a file stays after it was last asked for
_PREFIX = "medley-page-"
_LOCK = ".lock"
SWEEP = 600.0  # seconds between two looks for files that are older


@cache
def private_folder() -> Path:
    """Where the pages of this process keep pictures, those of Gradio too: nobody else on the
    machine may look into it, and it goes with the process. Where a process was killed, the next
    one's start removes what it left."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError, Timeout), FileLock(left / _LOCK, timeout=0):  # nobody holds it
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    held = FileLock(folder / _LOCK)
    held.acquire()

    def leave() -> None:
        held.release()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(leave)
    return folder


@dataclass(frozen=True)
class StoredImage:
    """A picture: the file that the model reads, by the name it came with, and a PNG of it that is
    shown."""

    file: Path
    shown: Path
    name: str

    def read(self) -> bytes:
        """What the model reads. Raises RequestError for a picture that is not kept any more."""
        self._use()
        return self.file.read_bytes()

    @property
    def image(self) -> Image.Image:
        """What is shown of it."""
        self._use()
        with Image.open(self.shown) as image:
            return image.convert("RGB")

    @property
    def address(self) -> str:
        """What is shown of it, as a data address."""
        self._use()
        return f"data:image/png;base64,{base64.b64encode(self.shown.read_bytes()).decode()}"

    def _use(self) -> None:
        try:
            for path in {self.file, self.shown}:
                os.utime(path)
        except OSError as error:
            raise RequestError(
                f"{self.name} of this talk is not kept any more: clear the talk, and send it again"
            ) from error


class ImageStore:
    """Files of one folder, each content once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.growing = folder / "kept", folder / "growing"
        for own in (self.folder, self.growing):
            own.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._swept = time.monotonic()

    def sent(self, file: str, limits: Limits) -> StoredImage:
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
        return StoredImage(self._keep(data, self.folder), self._png(image, self.folder), path.name)

    def drawn(self, image: Image.Image) -> StoredImage:
        path = self._png(image, self.folder)
        return StoredImage(path, path, "a drawn picture")

    def preview(self, image: Image.Image) -> StoredImage:
        """Of a picture that is not whole: kept for minutes."""
        path = self._png(image, self.growing)
        return StoredImage(path, path, "a picture that grows")

    def settled(self, parts: tuple[str | StoredImage, ...]) -> tuple[str | StoredImage, ...]:
        """With previews as pictures that stay."""
        return tuple(
            self.drawn(part.image)
            if isinstance(part, StoredImage) and part.file.parent == self.growing else part
            for part in parts
        )  # fmt: skip

    def write(self, name: str, text: str) -> Path:
        """A file for one reader to take away, at a place that nobody else can guess."""
        path = self.folder / secrets.token_hex(16) / name
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        return path

    def _png(self, image: Image.Image, folder: Path) -> Path:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return self._keep(buffer.getvalue(), folder, ".png")

    def _keep(self, data: bytes, folder: Path, suffix: str = "") -> Path:
        path = folder / f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
        with self._lock:
            if path.exists():
                os.utime(path)
            else:
                path.write_bytes(data)
            if time.monotonic() - self._swept > SWEEP:
                self._swept = time.monotonic()
                self._sweep(self.folder, KEPT)
                self._sweep(self.growing, SWEEP)
        return path

    def _sweep(self, folder: Path, age: float) -> None:
        for path in folder.iterdir():
            if path.stat().st_mtime >= time.time() - age:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
