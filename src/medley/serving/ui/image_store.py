"""Images of the web UI's conversations, as files; a conversation holds only their paths."""

from __future__ import annotations

import atexit
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

from medley.images.formats import ImageError, open_pillow
from medley.serving.limits import Limits, RequestError
from medley.serving.untrusted_inputs import read_untrusted_image
from medley.utils.html import data_url

MAX_DISPLAY_SIZE = 1000  # maximum width and height in pixels of a displayed image
RETENTION_SECONDS = 24 * 3600.0  # time after the last use of a file until it is deleted
CLEANUP_SECONDS = 600.0  # time between two deletions, and retention of previews
WRITES_PER_CLEANUP = 16  # A cleanup follows after this part of the space was written.
EXAMPLES = "examples"  # subfolder with the images of the examples
_PREFIX = "medley-ui-"
_LOCK = ".lock"


@cache
def private_folder() -> Path:
    """This process's folder for images and for Gradio's files, deleted when the process exits.

    Other users cannot read it. Also deletes folders of processes that were killed.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        # A live process holds the lock of its folder.
        with suppress(OSError, Timeout), FileLock(folder / _LOCK, timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = FileLock(folder / _LOCK)
    lock.acquire()

    def delete() -> None:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(delete)
    return folder


@dataclass(frozen=True)
class StoredImage:
    """An image: the file that the model reads, a PNG to display, and the name of the upload.

    Its methods raise RequestError if the files were deleted.
    """

    path: Path
    display_path: Path
    name: str

    def read_bytes(self) -> bytes:
        """The contents of the file that the model reads."""
        self._touch()
        return self.path.read_bytes()

    @property
    def display_image(self) -> Image.Image:
        self._touch()
        with open_pillow(self.display_path, self.name) as image:
            return image.convert("RGB")

    @property
    def data_url(self) -> str:
        """The displayed image as a data URL."""
        return data_url(self.display_image)

    def _touch(self) -> None:
        """Sets the time of the last use to now."""
        try:
            for path in {self.path, self.display_path}:
                os.utime(path)
        except OSError as error:
            raise RequestError(
                f"{self.name}: This image was deleted. Clear the conversation, and send the image "
                "again."
            ) from error


@dataclass(frozen=True)
class FolderSize:
    """Bytes and number of the files of a folder."""

    size: int
    files: int


def delete_unused(folder: Path, seconds: float, max_size: int, max_files: int) -> FolderSize:
    """Deletes files that were not used for `seconds`, the oldest first, until the limits hold.

    Returns the size of the folder, which exceeds the limits if all other files were used since. The
    examples of the web UI are not deleted and not counted.
    """
    found: list[tuple[float, int, Path]] = []
    for parent, subfolders, names in os.walk(folder):
        if parent == str(folder) and EXAMPLES in subfolders:
            subfolders.remove(EXAMPLES)
        for path in (Path(parent, name) for name in names if name != _LOCK):
            with suppress(OSError):  # Another thread has deleted it.
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
    size, files = sum(size for _, size, _ in found), len(found)
    for used_at, file_size, path in sorted(found):
        if (size <= max_size and files <= max_files) or used_at > time.time() - seconds:
            break
        path.unlink(missing_ok=True)
        size, files = size - file_size, files - 1
    return FolderSize(size, files)


class ImageStore:
    """Image files of one folder, named by their content; at most `limits.ui_bytes`, about.

    `exif_orientation`: display uploads rotated as their EXIF tag specifies, as the models see them.
    """

    def __init__(
        self, folder: Path, exif_orientation: bool = False, limits: Limits | None = None
    ) -> None:
        self.exif_orientation, self.limits = exif_orientation, limits or Limits()
        self.folder, self.previews = folder / "images", folder / "previews"
        for subfolder in (self.folder, self.previews):
            subfolder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._last_cleanup, self._written = time.monotonic(), 0

    def add_upload(self, file: str, limits: Limits) -> StoredImage:
        """An uploaded file. Raises RequestError if it is not an image within the limits."""
        path = Path(file)
        try:
            data = path.read_bytes()
            image = read_untrusted_image(data, path.name, limits, self.exif_orientation)
        except OSError as error:
            raise RequestError(f"{path.name}: {error.strerror}. Upload it again.") from error
        except ImageError as error:
            raise RequestError(str(error)) from error
        image.thumbnail((MAX_DISPLAY_SIZE, MAX_DISPLAY_SIZE))
        display_path = self._save_png(image, self.folder)
        return StoredImage(self._save(data, self.folder), display_path, path.name)

    def add_generated(self, image: Image.Image) -> StoredImage:
        path = self._save_png(image, self.folder)
        return StoredImage(path, path, "generated image")

    def add_preview(self, image: Image.Image) -> StoredImage:
        """A preview of an incomplete image; deleted after minutes."""
        path = self._save_png(image, self.previews)
        return StoredImage(path, path, "preview")

    def persist_previews(
        self, parts: tuple[str | StoredImage, ...]
    ) -> tuple[str | StoredImage, ...]:
        """The parts of a stopped response, with previews stored like complete images."""
        return tuple(
            self.add_generated(part.display_image)
            if isinstance(part, StoredImage) and part.path.parent == self.previews else part
            for part in parts
        )  # fmt: skip

    def write_text(self, name: str, text: str) -> Path:
        """Writes a file to download, at a path that other users cannot guess."""
        path = self.folder / secrets.token_hex(16) / name
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        return path

    def _save_png(self, image: Image.Image, folder: Path) -> Path:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return self._save(buffer.getvalue(), folder, ".png")

    def _save(self, data: bytes, folder: Path, suffix: str = "") -> Path:
        path = folder / f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
        with self._lock:
            if path.exists():
                os.utime(path)
            else:
                path.write_bytes(data)
                self._written += len(data)
            is_full = self._written > self.limits.ui_bytes / WRITES_PER_CLEANUP
            if is_full or time.monotonic() - self._last_cleanup > CLEANUP_SECONDS:
                self._clean_up()
        return path

    def _clean_up(self) -> None:
        self._last_cleanup, self._written = time.monotonic(), 0
        self._delete_older(self.folder, RETENTION_SECONDS)
        self._delete_older(self.previews, CLEANUP_SECONDS)
        # Generated images are not uploads; without this they could fill the disk.
        delete_unused(self.folder, CLEANUP_SECONDS, self.limits.ui_bytes, self.limits.ui_files)

    def _delete_older(self, folder: Path, seconds: float) -> None:
        for path in folder.iterdir():
            if path.stat().st_mtime >= time.time() - seconds:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
