"""DICOM and NIfTI frames as 8-bit pictures, windowed and never saturated.

Needs pydicom and nibabel (`pip install medley-mm[medical]`), and only when such a file comes.
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

Kind = Literal["dicom", "nifti", "nifti.gz"]
SUFFIXES = (".dcm", ".dicom", ".ima", ".nii", ".nii.gz")
LARGEST_VOLUME = 4 << 30  # bytes of a NIfTI volume once unpacked
_DICOM_MARK_AT = 128
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax's name (PS3.5, A.5)


def kind_of(data: BinaryIO, name: str) -> Kind | None:
    """What a file is, by its suffix, or by DICOM's mark, since scanners leave suffixes out."""
    lowered = name.lower()
    if lowered.endswith(".nii.gz"):
        return "nifti.gz"
    if lowered.endswith(".nii"):
        return "nifti"
    if lowered.endswith(SUFFIXES):
        return "dicom"
    start = data.tell()
    data.seek(start + _DICOM_MARK_AT)
    mark = data.read(4)
    data.seek(start)
    return "dicom" if mark == b"DICM" else None


def count_frames(data: BinaryIO, kind: Kind) -> int:
    """Frames of a DICOM file, or slices of a NIfTI volume along its third axis (times time)."""
    start = data.tell()
    try:
        if kind == "dicom":
            return int(_dicom(data, header_only=True).get("NumberOfFrames", 1) or 1)
        shape, axes = _nifti_shape(data, kind)
        turned = [shape[axes.index(i)] for i in range(len(axes))] + list(shape[len(axes) :])
        return math.prod(turned[2:])
    finally:
        data.seek(start)


def pixels_of_dicom(data: bytes) -> int:
    """Rows x columns x frames, as the header has them; nothing is unpacked for it.

    Raises UserError for a deflated file, whose header cannot be read without unpacking all of it.
    """
    if _DEFLATED in data:
        raise UserError("a deflated DICOM file, which may unpack to any size: save it plain")
    header = _dicom(io.BytesIO(data), header_only=True)
    sizes = (header.get(name, 1) or 1 for name in ("Rows", "Columns", "NumberOfFrames"))
    return math.prod(int(size) for size in sizes)


def read_frame(data: BinaryIO, kind: Kind, frame: int, name: str) -> Image.Image:
    """One frame as an RGB picture; raises UserError or what a broken file makes a reader raise."""
    if kind == "dicom":
        return _dicom_frame(_dicom(data), frame)
    return _nifti_slice(data, kind, frame, name)


def rescale_to_uint8(
    values: NDArray[Any], keep: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Grey values of any depth -> uint8, smallest to black, largest to white.

    `keep` marks the values that decide the range; those that are not finite never do.
    """
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    deciding = finite if keep is None else finite & keep
    if not deciding.any():
        return np.zeros(values.shape, np.uint8)
    low, high = float(values[deciding].min()), float(values[deciding].max())
    if low == high:  # nothing to spread: place the one value in the range of 16 bits
        low, high = 0.0, max(65535.0, high)
    return _to_bytes((np.where(finite, values, low) - low) / (high - low))


def _to_bytes(unit: NDArray[np.float64]) -> NDArray[np.uint8]:
    return (unit * 255).round().clip(0, 255).astype(np.uint8)


def _refuse_huge(rows: int, columns: int) -> None:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow's own limit for other pictures
    if limit and rows * columns > limit:
        raise UserError(f"{columns} x {rows} pixels, the limit is {limit}")


# --- DICOM --------------------------------------------------------------------------------


def _dicom(data: BinaryIO, header_only: bool = False) -> Any:
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise UserError("a DICOM file needs pydicom: pip install medley-mm[medical]") from error
    return dcmread(data, stop_before_pixels=header_only, force=True)


def _dicom_frame(dataset: Any, frame: int) -> Image.Image:
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    if "PixelData" not in dataset:
        raise UserError("a DICOM file without pixels")
    _refuse_huge(int(dataset.Rows), int(dataset.Columns))
    several = int(dataset.get("NumberOfFrames", 1) or 1) > 1
    stored = pixel_array(dataset, index=frame if several else 0)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        return _colour(stored, stored.dtype.itemsize * 8)
    if stored.ndim == 3:
        return _colour(stored, int(dataset.BitsStored))
    rescale = _of_frame(dataset, frame, "PixelValueTransformationSequence")
    if rescale is None:
        values = np.asarray(apply_modality_lut(stored, dataset), np.float64)
    else:
        values = stored * float(rescale.RescaleSlope) + float(rescale.RescaleIntercept)
    grey = _window(values, dataset, _of_frame(dataset, frame, "FrameVOILUTSequence"), stored)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    return Image.fromarray(grey).convert("RGB")


def _colour(stored: NDArray[Any], bits: int) -> Image.Image:
    return Image.fromarray(_to_bytes(stored / (2.0**bits - 1)))


def _of_frame(dataset: Any, frame: int, name: str) -> Any:
    """What an enhanced multi-frame file says of one frame, or of all; None for nothing."""
    groups = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    for group in [*groups, *(dataset.get("SharedFunctionalGroupsSequence") or [])]:
        if group.get(name):
            return group.get(name)[0]
    return None


def _window(
    values: NDArray[np.float64], dataset: Any, of_frame: Any, stored: NDArray[Any]
) -> NDArray[np.uint8]:
    """Grey values after the modality transform -> uint8 by the frame's or the file's first VOI.

    A lookup table, else a window (PS3.3 C.11.2.1.2 and C.11.2.1.3), else the range of the
    values themselves, padding left out.
    """
    from pydicom.pixels import apply_voi

    if of_frame is None and dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return _to_bytes(apply_voi(values.astype(np.int64), dataset) / (2.0**bits - 1))
    voi = dataset if of_frame is None else of_frame
    center, width = _first(voi.get("WindowCenter")), _first(voi.get("WindowWidth"))
    if center is None or width is None or width <= 0:
        padding = dataset.get("PixelPaddingValue")
        return rescale_to_uint8(values, None if padding is None else stored != padding)
    function = str(voi.get("VOILUTFunction") or "LINEAR")
    if function == "SIGMOID":
        return _to_bytes(1 / (1 + np.exp(-4 * (values - center) / width)))
    if function == "LINEAR":  # its window is one value narrower and half a value lower
        center, width = center - 0.5, max(width - 1, 1e-9)
    return _to_bytes(np.clip((values - center) / width + 0.5, 0, 1))


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)


# --- NIfTI --------------------------------------------------------------------------------


def _unpacked(data: BinaryIO, kind: Kind) -> BinaryIO:
    return gzip.GzipFile(fileobj=data) if kind == "nifti.gz" else data  # type: ignore[return-value]


def _header(data: BinaryIO, kind: Kind) -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise UserError("a NIfTI file needs nibabel: pip install medley-mm[medical]") from error
    start = data.tell()
    first = _unpacked(data, kind).read(4)
    data.seek(start)
    sizes = {int.from_bytes(first, "little"), int.from_bytes(first, "big")}
    image_class = nibabel.Nifti2Image if 540 in sizes else nibabel.Nifti1Image
    header = image_class.header_class.from_fileobj(_unpacked(data, kind), check=False)
    data.seek(start)
    return image_class, header


def _nifti_shape(data: BinaryIO, kind: Kind) -> tuple[tuple[int, ...], list[int]]:
    """The shape as it is stored, and which axis each of the first three becomes when turned."""
    _, header = _header(data, kind)
    shape = tuple(int(length) for length in header.get_data_shape())
    if len(shape) < 2 or min(shape) < 1:
        raise UserError(f"a NIfTI volume of shape {shape}")
    size = math.prod(shape) * header.get_data_dtype().itemsize
    if size > LARGEST_VOLUME:
        raise UserError(f"a NIfTI volume of {size} bytes, the limit is {LARGEST_VOLUME}")
    if len(shape) < 3:  # a single picture, which is not turned
        _refuse_huge(shape[1], shape[0])
        return shape, [0, 1]
    from nibabel.orientations import io_orientation

    axes = [int(axis) for axis in io_orientation(header.get_best_affine())[:, 0]]
    _refuse_huge(shape[axes.index(1)], shape[axes.index(0)])
    return shape, axes


def _nifti_slice(data: BinaryIO, kind: Kind, frame: int, name: str) -> Image.Image:
    volume, low, high = _volume(data, kind, name)
    # First axis to the right, second one up: the way a slice is looked at.
    turned = np.rot90(volume[:, :, frame]).astype(np.float64)
    unit = (np.where(np.isfinite(turned), turned, low) - low) / ((high - low) or 1.0)
    return Image.fromarray(_to_bytes(unit)).convert("RGB")


Volume = tuple[NDArray[Any], float, float]
_LAST: dict[tuple[object, ...], Volume] = {}  # one volume: its slices are read in a row


def _volume(data: BinaryIO, kind: Kind, name: str) -> Volume:
    """Voxels (X, Y, slices), and the range of them all: the slices share one window."""
    changed = os.fstat(data.fileno()).st_mtime_ns if hasattr(data, "name") else 0
    identity = (name, changed, len(data.getbuffer()) if isinstance(data, io.BytesIO) else 0)
    if identity not in _LAST:
        loaded = _load_volume(data, kind)
        _LAST.clear()
        _LAST[identity] = loaded
    return _LAST[identity]


def _load_volume(data: BinaryIO, kind: Kind) -> Volume:
    shape, _ = _nifti_shape(data, kind)
    image_class, header = _header(data, kind)
    import nibabel

    # No more than header, extensions and voxels can have: what follows them is nobody's.
    voxels = math.prod(shape) * header.get_data_dtype().itemsize
    raw = _unpacked(data, kind).read(int(header.get_data_offset()) + voxels)
    image = image_class.from_bytes(raw)
    if len(shape) > 2:
        image = nibabel.as_closest_canonical(image)
    volume = np.asanyarray(image.dataobj)
    if volume.dtype.fields:  # RGB: three bytes a voxel
        raise UserError("a NIfTI volume of colours is not read; save it as grey values")
    volume = volume.reshape(*volume.shape[:2], -1, order="F")
    finite = volume[np.isfinite(volume)]
    if not finite.size:
        return volume, 0.0, 1.0
    return volume, float(finite.min()), float(finite.max())
