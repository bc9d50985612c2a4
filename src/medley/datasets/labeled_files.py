"""Image files of a labeled dataset: their frames, and the patient of a DICOM file."""

from __future__ import annotations

from pathlib import Path

from medley.datasets.base import RecordError
from medley.errors import UserError
from medley.images import medical
from medley.images.formats import Frames, has_image_suffix
from medley.utils.unicode_names import existing_name

_PLAIN_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")  # one frame, no patient


def frame_names(path: str, frames: Frames | None) -> tuple[list[str], str | None]:
    """The names of the selected frames of an image file, `path#3`, and its PatientID.

    A file with a single frame keeps its name. A missing or broken file does so as well; it is
    reported when the images are checked. Raises RecordError for a file with several frames if none
    is selected.
    """
    name = existing_name(path)
    if path.lower().endswith(_PLAIN_SUFFIXES) or not Path(name).is_file():
        return [path], None
    try:
        count, patient = _read_header(name)
    except Exception:  # decoders raise arbitrary exceptions for broken files
        return [path], None
    if count == 1:
        return [path], patient
    if frames is None:
        raise RecordError(
            f"{path}: The file has {count} frames. Select with --frames first|middle|all."
        )
    numbers = {"first": [0], "middle": [count // 2]}.get(frames, list(range(count)))
    return [f"{path}#{number}" for number in numbers], patient


def _read_header(name: str) -> tuple[int, str | None]:
    """Number of frames, and PatientID."""
    from medley.images.preprocess import count_frames  # imports torch: one second

    with open(name, "rb") as data:
        is_dicom = medical.detect_format(data, name) == "dicom"
        count = count_frames(data, name)
        return count, medical.read_patient_id(data) if is_dicom else None


def is_image_file(path: Path) -> bool:
    """Whether a file has the suffix of an image, or is DICOM without one."""
    if has_image_suffix(path.name):
        return True
    try:
        with open(path, "rb") as data:
            return medical.detect_format(data, path.name) == "dicom"
    except (OSError, UserError):
        return False
