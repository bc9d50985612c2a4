"""DICOM and NIfTI frames -> 8-bit images, windowed and never saturated.

Needs pydicom and nibabel (`pip install 'medley-mm[medical]'`), but only to read such files.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import zlib
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medley.errors import UserError
from medley.images.formats import MAX_DECODED_BYTES, MEDICAL_SUFFIXES, check_frames, check_pixels
from medley.utils.extras import require_extra

Kind = Literal["dicom", "nifti", "nifti.gz"]
_DICOM_MAGIC_OFFSET = 128
# A DICOM file without preamble begins with an element of group 0002 or 0008, in little endian.
_FIRST_ELEMENTS = re.compile(
    rb"(\x02\x00[\x00\x01\x02]|\x08\x00[\x00\x01\x05\x08\x12-\x16])\x00", re.DOTALL
)
_MAX_HEADER_BYTES = 540  # of NIfTI-2
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # UID of the transfer syntax (PS3.5, A.5)


def detect_format(data: BinaryIO, name: str) -> Kind | None:
    """The medical format of a file, or None.

    The suffix determines the format. A file without one of the suffixes is DICOM if it has DICOM's
    magic bytes, or begins with one of DICOM's elements: scanners often write no suffix, and
    treatment planning systems no magic bytes.
    """
    lowered = name.lower()
    if lowered.endswith(".nii.gz"):
        return "nifti.gz"
    if lowered.endswith(".nii"):
        return "nifti"
    if lowered.endswith(MEDICAL_SUFFIXES):
        return "dicom"
    start = data.tell()
    head = data.read(_DICOM_MAGIC_OFFSET + 4)
    data.seek(start)
    is_dicom = head[_DICOM_MAGIC_OFFSET:] == b"DICM" or _begins_with_element(head)
    return "dicom" if is_dicom else None


def _begins_with_element(head: bytes) -> bool:
    """Whether a file begins with a plausible DICOM element, as files without preamble do."""
    if not _FIRST_ELEMENTS.match(head):
        return False
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    return explicit or 0 < int.from_bytes(head[4:8], "little") <= 64


def count_frames(data: BinaryIO, kind: Kind) -> int:
    """Frames of a DICOM file, or slices of a NIfTI volume along its third axis (times time)."""
    start = data.tell()
    try:
        if kind == "dicom":
            header = _read_dicom(data, header_only=True)
            return check_frames(int(header.get("NumberOfFrames", 1) or 1))
        shape, axes = _nifti_shape(data, kind)
        canonical = [shape[axes.index(i)] for i in range(len(axes))] + list(shape[len(axes) :])
        return check_frames(math.prod(canonical[2:]))
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


def read_patient_id(data: BinaryIO) -> str | None:
    """The PatientID of a DICOM file; None if it is missing or empty."""
    return str(_read_dicom(data, header_only=True).get("PatientID") or "").strip() or None


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


# --- DICOM --------------------------------------------------------------------------------


def _read_dicom(data: BinaryIO, header_only: bool = False) -> Any:
    require_extra("pydicom", "medical", "Reading a DICOM file")
    from pydicom import dcmread

    _check_deflated_size(data)
    dataset = dcmread(data, stop_before_pixels=header_only, force=True)
    if not header_only and "TransferSyntaxUID" not in dataset.file_meta:
        _infer_transfer_syntax(dataset)
    return dataset


def _check_deflated_size(data: BinaryIO) -> None:
    """Raises UserError for a deflated file that decompresses to too many bytes."""
    start = data.tell()
    head = data.read(1 << 16)
    data.seek(start)
    first = _DICOM_MAGIC_OFFSET + 4
    if _DEFLATED not in head or head[first - 4 : first] != b"DICM":
        return
    if head[first : first + 4] != b"\2\0\0\0":  # the length of the elements before the pixels
        raise UserError("The deflated DICOM file has no group length. Save it without deflate.")
    data.seek(start + first + 12 + int.from_bytes(head[first + 8 : first + 12], "little"))
    inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while not inflate.eof and (chunk := inflate.unconsumed_tail or data.read(1 << 16)):
        size += len(inflate.decompress(chunk, 1 << 20))
        if size > MAX_DECODED_BYTES:
            raise UserError(
                f"The deflated DICOM file is too large (expected at most {MAX_DECODED_BYTES} "
                "bytes). Save it without deflate."
            )
    data.seek(start)


def _infer_transfer_syntax(dataset: Any) -> None:
    """Sets the transfer syntax that pydicom found while it parsed a file without one.

    Raises UserError for compressed pixels, whose coding only the transfer syntax names.
    """
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
        raise UserError(
            "The DICOM file has compressed pixels and no transfer syntax (0002,0010), which names "
            "their coding. Add it, with dcmodify for example."
        )
    is_implicit, is_little_endian = dataset.original_encoding
    if is_implicit:
        syntax = ImplicitVRLittleEndian
    else:
        syntax = ExplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = syntax


def _dicom_frame(dataset: Any, frame: int) -> Image.Image:
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    if "PixelData" not in dataset:
        raise UserError("The DICOM file has no pixel data.")
    check_pixels(int(dataset.Columns), int(dataset.Rows))
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
    block = _decompress(data, kind).read(_MAX_HEADER_BYTES)
    data.seek(start)
    sizes = {int.from_bytes(block[:4], order) for order in ("little", "big")}
    image_class = nibabel.Nifti2Image if 540 in sizes else nibabel.Nifti1Image
    size = image_class.header_class.sizeof_hdr
    if len(block) < size:
        raise UserError(f"The NIfTI file is truncated (got {len(block)} bytes of its header).")
    # Without the extensions after the header, which may claim any size.
    return image_class, image_class.header_class(block[:size], check=False)


def _nifti_shape(data: BinaryIO, kind: Kind) -> tuple[tuple[int, ...], list[int]]:
    """The stored shape, and the canonical axis of each of its first three axes."""
    _, header = _nifti_header(data, kind)
    shape = tuple(int(length) for length in header.get_data_shape())
    if len(shape) < 2 or min(shape) < 1:
        raise UserError(f"Unsupported NIfTI volume of shape {shape}.")
    voxels = math.prod(shape) * header.get_data_dtype().itemsize
    size = int(header.get_data_offset()) + voxels
    if not 0 < size <= MAX_DECODED_BYTES:
        raise UserError(
            f"The NIfTI volume is too large (got {size} bytes, expected at most "
            f"{MAX_DECODED_BYTES})."
        )
    if len(shape) < 3:  # a single image, which is not reoriented
        check_pixels(shape[0], shape[1])
        return shape, [0, 1]
    from nibabel.orientations import io_orientation

    axes = [int(axis) for axis in io_orientation(header.get_best_affine())[:, 0]]
    check_pixels(shape[axes.index(0)], shape[axes.index(1)])
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
