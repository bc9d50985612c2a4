"""Images in folders and WebDataset tars, and counts of the files that are passed over."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from medley.errors import UserError
from medley.images import medical
from medley.images.formats import has_image_suffix
from medley.images.image_source import ImageSource
from medley.utils.files import escape_name

TAR = ".tar"
TAR_COLUMNS = ("__key__", "txt", "json")  # the columns of a WebDataset sample
Sample = dict[str, str | None]


def describe_skipped(skipped: Counter[str]) -> str:
    """The files that are not images: `3 files skipped: 2 .txt, 1 .mp4`, or an empty text."""
    if not skipped:
        return ""
    parts = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common())
    count = skipped.total()
    return f"{count} file{'s' * (count != 1)} skipped: {parts}"


def folder_images(path: Path, skipped: Counter[str]) -> Iterator[tuple[ImageSource, Sample]]:
    """The images below a folder, of a tar, or one image file. Counts other files by suffix."""
    files = _walk(path, skipped) if path.is_dir() else iter([str(path)])
    for file in files:
        if is_tar(file):
            yield from _tar_samples(file, skipped)
        else:
            yield ImageSource(file, file), dict.fromkeys(TAR_COLUMNS)


def is_tar(name: str) -> bool:
    return name.lower().endswith(TAR)


def _count(skipped: Counter[str], name: str) -> None:
    base = name.rpartition("/")[2]
    suffix = "" if base.startswith(".") else Path(base).suffix.lower()
    is_hidden = base.startswith(".")
    skipped["hidden" if is_hidden else escape_name(suffix)[:20] or "without suffix"] += 1


def _walk(
    folder: Path | str, skipped: Counter[str], ancestors: tuple[str, ...] = ()
) -> Iterator[str]:
    """Images and tars below a folder, sorted by name."""
    real = os.path.realpath(folder)
    if real in ancestors:
        raise UserError(f"{folder}: A symbolic link to its own ancestor {real}. Remove the link.")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        is_hidden = entry.name.startswith(".")
        if entry.is_dir():
            if not is_hidden:
                yield from _walk(entry.path, skipped, (*ancestors, real))
        elif not is_hidden and _is_readable(entry.path):
            yield entry.path
        else:
            _count(skipped, entry.name)


def _is_readable(path: str) -> bool:
    """Whether a file is an image or a tar.

    Scanners write DICOM files without a suffix, or with a numeric one.
    """
    if has_image_suffix(path) or is_tar(path):
        return True
    try:
        with open(path, "rb") as data:
            return medical.detect_format(data, path) == "dicom"
    except OSError:
        return False


def _tar_samples(file: str, skipped: Counter[str]) -> Iterator[tuple[ImageSource, Sample]]:
    """The images of a tar."""
    try:
        with tarfile.open(file, "r:") as tar:
            for key, members in groupby(tar, lambda m: _sample_key(m.name)):
                # Links are included: they have no content, so opening them reports an error.
                files = [m for m in members if not m.isdir()]
                yield from _tar_images(tar, file, key, files, skipped)
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
        with open(file, "rb") as raw:
            raw.seek(tar.offset)
            if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                # tarfile does not report this.
                raise tarfile.ReadError("the end-of-archive block is missing")
    except tarfile.TarError as error:
        raise UserError(
            f"{file}: Cannot read the tar ({error}). Decompress it if it is compressed; download "
            "it again if it is broken."
        ) from error


def _sample_key(member: str) -> str:
    """WebDataset: adjacent files with the same name up to the first dot form a sample."""
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _tar_images(
    tar: tarfile.TarFile,
    file: str,
    key: str,
    members: list[tarfile.TarInfo],
    skipped: Counter[str],
) -> Iterator[tuple[ImageSource, Sample]]:
    sample: Sample = {**dict.fromkeys(TAR_COLUMNS), "__key__": escape_name(key)}
    for member in members:
        suffix = member.name.rpartition(".")[2].lower()
        if suffix in TAR_COLUMNS and member.isfile():
            stream = tar.extractfile(member)
            assert stream is not None
            sample[suffix] = stream.read().decode("utf-8", errors="replace")
    for member in members:
        if has_image_suffix(member.name):
            name = f"{file}/{member.name}"
            yield ImageSource(name, file, None, member.offset_data, member.size), sample
        elif member.name.rpartition(".")[2].lower() not in TAR_COLUMNS:
            _count(skipped, member.name)
