from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from conftest import ROOT
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from medley.images.preprocess import ImageError, count_frames, open_image

REAL = ROOT.parent / "shared" / "data" / "medical_formats"


def dicom(path: Path, values: np.ndarray[Any, Any], **tags: Any) -> Path:
    """Writes a gray DICOM file of signed 16-bit values, with one frame or several."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Rows, dataset.Columns = values.shape[-2:]
    if values.ndim == 3:
        dataset.NumberOfFrames = len(values)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = values.astype("<i2").tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def gray(path: Path | str, frame: Any = None) -> list[list[int]]:
    array = np.asarray(open_image(path, frame))
    assert array.dtype == np.uint8
    assert (array == array[..., :1]).all()
    return array[..., 0].tolist()


VALUES = np.array([[-1000, 0], [40, 3000]])


def test_values_without_window_are_rescaled(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", VALUES)
    assert gray(path) == [[0, 64], [66, 255]]
    padded = dicom(tmp_path / "b.dcm", VALUES, PixelPaddingValue=-1000)
    assert gray(padded) == [[0, 0], [3, 255]]


def test_rescale_is_applied_before_window(tmp_path: Path) -> None:
    window = {"WindowCenter": [40, 600], "WindowWidth": [400, 1500]}  # the first window is used
    path = dicom(tmp_path / "a.dcm", VALUES, **window)
    # PS3.3 C.11.2.1.2.1: ((x - (c - 0.5)) / (w - 1) + 0.5) * 255
    linear = [round(((x - 39.5) / 399 + 0.5) * 255) for x in (0, 40)]
    assert gray(path) == [[0, linear[0]], [linear[1], 255]]
    scaled = dicom(tmp_path / "b.dcm", VALUES, RescaleSlope=2, RescaleIntercept=-1000, **window)
    assert gray(scaled) == [[0, 0], [0, 255]]


@pytest.mark.parametrize(
    ("function", "expected"),
    [("LINEAR_EXACT", (40 - 40) / 400 + 0.5), ("SIGMOID", 1 / (1 + np.exp(0.0)))],
)
def test_other_window_functions(tmp_path: Path, function: str, expected: float) -> None:
    window = {"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": function}
    path = dicom(tmp_path / "a.dcm", VALUES, **window)
    assert gray(path)[1][0] == round(expected * 255)


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", VALUES, PhotometricInterpretation="MONOCHROME1")
    assert gray(path) == [[255, 191], [189, 0]]


def test_voi_lookup_table(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor = [4, 0, 8]  # four entries, from value 0, of 8 bits
    table.add_new("LUTData", "US", [0, 10, 200, 255])
    path = dicom(tmp_path / "a.dcm", np.array([[0, 1], [2, 9]]), VOILUTSequence=[table])
    assert gray(path) == [[0, 10], [200, 255]]


def test_one_of_several_frames_must_be_selected(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", np.arange(12).reshape(3, 2, 2))
    with pytest.raises(ImageError, match=r"has 3 frames\. Select with --frames .*a\.dcm#2"):
        open_image(path)
    assert gray(path, "first") == gray(f"{path}#0") == [[0, 85], [170, 255]]
    assert gray(path, "middle") == gray(path, 1)
    with pytest.raises(ImageError, match="Frame 3 does not exist"):
        open_image(f"{path}#3")


def test_dicom_without_suffix_is_detected_by_magic_bytes(tmp_path: Path) -> None:
    assert gray(dicom(tmp_path / "IM000001", VALUES))[1][1] == 255


@pytest.mark.parametrize("content", [b"", b"not dicom", b"\0" * 128 + b"DICM" + b"x" * 9])
def test_error_names_broken_dicom_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.dcm"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"broken\.dcm"):
        open_image(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_slices_share_the_window_of_their_volume(tmp_path: Path, suffix: str) -> None:
    volume = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = tmp_path / f"volume{suffix}"
    nibabel.Nifti1Image(volume, np.eye(4)).to_filename(path)
    with open(path, "rb") as data:
        assert count_frames(data, str(path)) == 4
    with pytest.raises(ImageError, match="has 4 frames"):
        open_image(path)
    # Columns follow the first axis, and the second axis points up.
    expected = np.rot90((volume[:, :, 3] / 23 * 255).round()).astype(int)
    assert gray(f"{path}#3") == expected.tolist()


@pytest.mark.parametrize("code", ["RAS", "LPS", "SRA", "ASR"])
def test_slices_are_counted_along_the_canonical_axis(tmp_path: Path, code: str) -> None:
    """Slices of a volume with permuted axes are those along its third axis after reorientation."""
    orientation = nibabel.orientations.axcodes2ornt(code)
    volume = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)  # in canonical orientation
    transform = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), orientation
    )
    stored = nibabel.orientations.apply_orientation(volume, transform)
    affine = nibabel.orientations.inv_ornt_aff(transform, volume.shape)
    path = tmp_path / "volume.nii"
    nibabel.Nifti1Image(stored, affine).to_filename(path)
    with open(path, "rb") as data:
        assert count_frames(data, str(path)) == 4
    for frame in range(4):
        expected = np.rot90((volume[:, :, frame] / 23 * 255).round()).astype(int)
        assert gray(path, frame) == expected.tolist()


def test_frame_is_windowed_by_its_own_or_the_shared_group(tmp_path: Path) -> None:
    def group(name: str, **tags: Any) -> Dataset:
        inner, outer = Dataset(), Dataset()
        for tag, value in tags.items():
            setattr(inner, tag, value)
        setattr(outer, name, [inner])
        return outer

    rescale = {"RescaleSlope": 2, "RescaleIntercept": -1000, "RescaleType": "US"}
    shared = group("PixelValueTransformationSequence", **rescale)
    wide, narrow = (
        group("FrameVOILUTSequence", WindowCenter=0, WindowWidth=w, VOILUTFunction="LINEAR_EXACT")
        for w in (1000, 100)
    )
    frames = np.full((2, 1, 1), 550)
    path = dicom(
        tmp_path / "a.dcm", frames, SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[wide, narrow],
    )  # fmt: skip
    assert gray(path, 0) == [[round((100 / 1000 + 0.5) * 255)]]
    assert gray(path, 1) == [[255]]


def test_replaced_volume_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "volume.nii"
    for value in (1, 2):
        volume = np.zeros((2, 2, 2), np.float32)
        volume[value - 1, 0, 0] = 1
        nibabel.Nifti1Image(volume, np.eye(4)).to_filename(path)
        assert gray(f"{path}#0") == np.rot90(volume[:, :, 0] * 255).astype(int).tolist()


@pytest.mark.parametrize("length", [10, 300, 352])
def test_error_names_truncated_nifti_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "truncated.nii"
    nibabel.Nifti1Image(np.ones((8, 8, 2), np.int16), np.eye(4)).to_filename(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ImageError, match=r"truncated\.nii"):
        open_image(f"{path}#0")


@pytest.mark.skipif(
    not REAL.is_dir(), reason="needs ../shared/data, which is not part of the repository"
)
def test_real_files_are_read() -> None:
    files = sorted(REAL.glob("*/*.*"))
    assert len(files) == 9
    for path in files:
        array = np.asarray(open_image(path))
        assert array.min() < 60
        assert array.max() > 240
        assert 25 < array.mean() < 140
