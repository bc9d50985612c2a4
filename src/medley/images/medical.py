"""DICOM and NIfTI frames -> 8-bit images, windowed and never saturated.

Needs pydicom and nibabel (`pip install 'medley-mm[medical]'`), but only to read such files.
"""

from __future__ import annotations

import gzip
import io
import math
import os
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medley.errors import UserError
from medley.utils.extras import require_extra

Kind = Literal["dicom", "nifti", "nifti.gz"]
SUFFIXES = (".dcm", ".dicom", ".ima", ".nii", ".nii.gz")
MAX_VOLUME_BYTES = 4 << 30  # of a decompressed NIfTI volume
_DICOM_MAGIC_OFFSET = 128
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # UID of the transfer syntax (PS3.5, A.5)


def detect_format(data: BinaryIO, name: str) -> Kind | None:
    """The medical format of a file, or None.

    The suffix determines the format. A file without one of the suffixes is DICOM if it has DICOM's
    magic bytes, because scanners often write no suffix.
    """
    lowered = name.lower()
    if lowered.endswith(".nii.gz"):
        return "nifti.gz"
    if lowered.endswith(".nii"):
        return "nifti"
    if lowered.endswith(SUFFIXES):
        return "dicom"
    start = data.tell()
    data.seek(start + _DICOM_MAGIC_OFFSET)
    magic = data.read(4)
    data.seek(start)
    return "dicom" if magic == b"DICM" else None


def count_frames(data: BinaryIO, kind: Kind) -> int:
    """Frames of a DICOM file, or slices of a NIfTI volume along its third axis (times time)."""
    start = data.tell()
    try:
        if kind == "dicom":
            return int(_read_dicom(data, header_only=True).get("NumberOfFrames", 1) or 1)
        shape, axes = _nifti_shape(data, kind)
        canonical = [shape[axes.index(i)] for i in range(len(axes))] + list(shape[len(axes) :])
        return math.prod(canonical[2:])
    finally:
        data.seek(start)


def count_dicom_pixels(data: bytes) -> int:
    """Rows x columns x frames according to the header, without decompressing pixels.

    Raises UserError for a deflated file, whose header cannot be read without decompressing all of
    it.
    """
    if _DEFLATED in data:
        raise UserError(
            "Deflated DICOM files are not supported, because they may decompress to any size. "
            "Save the file without deflate."
        )
    header = _read_dicom(io.BytesIO(data), header_only=True)
    sizes = (header.get(name, 1) or 1 for name in ("Rows", "Columns", "NumberOfFrames"))
    return math.prod(int(size) for size in sizes)


def read_frame(data: BinaryIO, kind: Kind, frame: int, name: str) -> Image.Image:
    """One frame as an RGB image. A broken file raises UserError or any exception of its reader."""
    if kind == "dicom":
        return _dicom_frame(_read_dicom(data), frame)
    return _nifti_slice(data, kind, frame, name)


def rescale_to_uint8(
    values: NDArray[Any], mask: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Gray values of any depth -> uint8, the smallest value to 0, the largest to 255.

    Only finite values inside of `mask` determine the range.
    """
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    in_range = finite if mask is None else finite & mask
    if not in_range.any():
        return np.zeros(values.shape, np.uint8)
    low, high = float(values[in_range].min()), float(values[in_range].max())
    if low == high:  # a constant image: its value relative to the range of 16 bits
        low, high = 0.0, max(65535.0, high)
    return _unit_to_uint8((np.where(finite, values, low) - low) / (high - low))


def _unit_to_uint8(unit: NDArray[np.float64]) -> NDArray[np.uint8]:
    return (unit * 255).round().clip(0, 255).astype(np.uint8)


def _check_size(rows: int, columns: int) -> None:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow's limit for its own formats
    if limit and rows * columns > limit:
        raise UserError(f"The image has too many pixels ({columns} x {rows}, limit {limit}).")


# --- DICOM --------------------------------------------------------------------------------


def _read_dicom(data: BinaryIO, header_only: bool = False) -> Any:
    require_extra("pydicom", "medical", "Reading a DICOM file")
    from pydicom import dcmread

    return dcmread(data, stop_before_pixels=header_only, force=True)


def _dicom_frame(dataset: Any, frame: int) -> Image.Image:
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    if "PixelData" not in dataset:
        raise UserError("The DICOM file has no pixel data.")
    _check_size(int(dataset.Rows), int(dataset.Columns))
    has_several = int(dataset.get("NumberOfFrames", 1) or 1) > 1
    stored = pixel_array(dataset, index=frame if has_several else 0)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        return _color_image(stored, stored.dtype.itemsize * 8)
    if stored.ndim == 3:
        return _color_image(stored, int(dataset.BitsStored))
    rescale = _functional_group(dataset, frame, "PixelValueTransformationSequence")
    if rescale is None:
        values = np.asarray(apply_modality_lut(stored, dataset), np.float64)
    else:
        values = stored * float(rescale.RescaleSlope) + float(rescale.RescaleIntercept)
    frame_voi = _functional_group(dataset, frame, "FrameVOILUTSequence")
    gray = _apply_window(values, dataset, frame_voi, stored)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        gray = 255 - gray
    return Image.fromarray(gray).convert("RGB")


def _color_image(stored: NDArray[Any], bits: int) -> Image.Image:
    return Image.fromarray(_unit_to_uint8(stored / (2.0**bits - 1)))


def _functional_group(dataset: Any, frame: int, name: str) -> Any:
    """The functional group `name` of one frame in an enhanced file, or the shared one, or None."""
    groups = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    for group in [*groups, *(dataset.get("SharedFunctionalGroupsSequence") or [])]:
        if group.get(name):
            return group.get(name)[0]
    return None


def _apply_window(
    values: NDArray[np.float64], dataset: Any, frame_voi: Any, stored: NDArray[Any]
) -> NDArray[np.uint8]:
    """Gray values after the modality transform -> uint8 by the first VOI of the frame or file.

    The VOI is a lookup table or a window (PS3.3 C.11.2.1.2 and C.11.2.1.3). Without a VOI, the
    range of the values is used, excluding the padding value.
    """
    from pydicom.pixels import apply_voi

    if frame_voi is None and dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return _unit_to_uint8(apply_voi(values.astype(np.int64), dataset) / (2.0**bits - 1))
    voi = dataset if frame_voi is None else frame_voi
    center, width = _first_value(voi.get("WindowCenter")), _first_value(voi.get("WindowWidth"))
    if center is None or width is None or width <= 0:
        padding = dataset.get("PixelPaddingValue")
        return rescale_to_uint8(values, None if padding is None else stored != padding)
    function = str(voi.get("VOILUTFunction") or "LINEAR")
    if function == "SIGMOID":
        return _unit_to_uint8(1 / (1 + np.exp(-4 * (values - center) / width)))
    if function == "LINEAR":  # one value narrower and half a value lower than LINEAR_EXACT
        center, width = center - 0.5, max(width - 1, 1e-9)
    return _unit_to_uint8(np.clip((values - center) / width + 0.5, 0, 1))


def _first_value(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)


# --- NIfTI --------------------------------------------------------------------------------


def _decompress(data: BinaryIO, kind: Kind) -> BinaryIO:
    return gzip.GzipFile(fileobj=data) if kind == "nifti.gz" else data  # type: ignore[return-value]


def _nifti_header(data: BinaryIO, kind: Kind) -> tuple[Any, Any]:
    """The image class (NIfTI-1 or NIfTI-2) and the header."""
    require_extra("nibabel", "medical", "Reading a NIfTI file")
    import nibabel

    start = data.tell()
    first = _decompress(data, kind).read(4)
    data.seek(start)
    sizes = {int.from_bytes(first, "little"), int.from_bytes(first, "big")}
    image_class = nibabel.Nifti2Image if 540 in sizes else nibabel.Nifti1Image
    header = image_class.header_class.from_fileobj(_decompress(data, kind), check=False)
    data.seek(start)
    return image_class, header


def _nifti_shape(data: BinaryIO, kind: Kind) -> tuple[tuple[int, ...], list[int]]:
    """The stored shape, and the canonical axis of each of its first three axes."""
    _, header = _nifti_header(data, kind)
    shape = tuple(int(length) for length in header.get_data_shape())
    if len(shape) < 2 or min(shape) < 1:
        raise UserError(f"Unsupported NIfTI volume of shape {shape}.")
    size = math.prod(shape) * header.get_data_dtype().itemsize
    if size > MAX_VOLUME_BYTES:
        raise UserError(
            f"The NIfTI volume is too large (got {size} bytes, expected at most "
            f"{MAX_VOLUME_BYTES})."
        )
    if len(shape) < 3:  # a single image, which is not reoriented
        _check_size(shape[1], shape[0])
        return shape, [0, 1]
    from nibabel.orientations import io_orientation

    axes = [int(axis) for axis in io_orientation(header.get_best_affine())[:, 0]]
    _check_size(shape[axes.index(1)], shape[axes.index(0)])
    return shape, axes


def _nifti_slice(data: BinaryIO, kind: Kind, frame: int, name: str) -> Image.Image:
    volume, low, high = _volume(data, kind, name)
    # The first axis points right and the second one up, the usual orientation of a slice.
    values = np.rot90(volume[:, :, frame]).astype(np.float64)
    unit = (np.where(np.isfinite(values), values, low) - low) / ((high - low) or 1.0)
    return Image.fromarray(_unit_to_uint8(unit)).convert("RGB")


Volume = tuple[NDArray[Any], float, float]
_last_volume: dict[tuple[object, ...], Volume] = {}  # one entry; slices are read consecutively


def _volume(data: BinaryIO, kind: Kind, name: str) -> Volume:
    """Voxels (X, Y, slices), and their smallest and largest value: all slices share one window."""
    modified = os.fstat(data.fileno()).st_mtime_ns if hasattr(data, "name") else 0
    key = (name, modified, len(data.getbuffer()) if isinstance(data, io.BytesIO) else 0)
    if key not in _last_volume:
        loaded = _load_volume(data, kind)
        _last_volume.clear()
        _last_volume[key] = loaded
    return _last_volume[key]


def _load_volume(data: BinaryIO, kind: Kind) -> Volume:
    shape, _ = _nifti_shape(data, kind)
    image_class, header = _nifti_header(data, kind)
    import nibabel

    # Read only header, extensions and voxels, so that trailing data cannot exceed the limit.
    voxels = math.prod(shape) * header.get_data_dtype().itemsize
    raw = _decompress(data, kind).read(int(header.get_data_offset()) + voxels)
    image = image_class.from_bytes(raw)
    if len(shape) > 2:
        image = nibabel.as_closest_canonical(image)
    volume = np.asanyarray(image.dataobj)
    if volume.dtype.fields:  # RGB: three bytes per voxel
        raise UserError("NIfTI volumes of RGB values are not supported. Save gray values.")
    volume = volume.reshape(*volume.shape[:2], -1, order="F")
    finite = volume[np.isfinite(volume)]
    if not finite.size:
        return volume, 0.0, 1.0
    return volume, float(finite.min()), float(finite.max())
