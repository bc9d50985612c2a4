"""Small datasets of images with labels, in the layouts that `medley convert` reads."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medley import cli
from medley.data.document import Document

SPLITS = ("train", "val", "test")


def write_npz(
    path: Path, labels: Sequence[Any], channels: int = 1, size: int = 8, dtype: Any = np.uint8,
    **replaced: Any,
) -> Path:  # fmt: skip
    """A MedMNIST file whose three splits have the same labels; no two images are equal.

    `replaced` are arrays by name; None removes one.
    """
    arrays: dict[str, Any] = {}
    random = np.random.default_rng(0)
    for split in SPLITS:
        shape = (len(labels), size, size) if channels == 1 else (len(labels), size, size, channels)
        arrays[f"{split}_images"] = random.integers(0, np.iinfo(dtype).max, shape).astype(dtype)
        rows = np.array(labels)
        arrays[f"{split}_labels"] = rows[:, None] if rows.ndim == 1 else rows
    arrays |= replaced
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def write_image(path: Path, value: int = 0, bits: int = 8) -> Path:
    """A gray PNG whose pixels depend on `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.arange(64).reshape(8, 8) + value
    Image.fromarray(pixels.astype(np.uint8 if bits == 8 else np.uint16)).save(path)
    return path


def write_dicom(path: Path, patient: str | None, value: int = 0, frames: int = 1) -> Path:
    """A gray DICOM file of 12 bits."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    if patient is not None:
        dataset.PatientID = patient
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = 8, 8, frames
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    pixels = np.random.default_rng(value).integers(0, 4096, 64 * frames).astype(np.uint16)
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path)
    return path


def write_nifti(path: Path, slices: int = 1, value: int = 0) -> Path:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    volume = np.random.default_rng(value).integers(0, 4096, (8, 8, slices)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
    return path


def write_csv(path: Path, rows: Sequence[dict[str, Any]], encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(source: str, path: Path, output: Path, *words: Any) -> int:
    command = ["convert", "--from", source, "--input", path, "--output", output, *words]
    return cli.main([str(word) for word in command])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def converted(
    source: str, path: Path, output: Path, *words: Any
) -> dict[str, list[dict[str, Any]]]:
    """Split -> rows of a conversion that succeeds."""
    assert run(source, path, output, *words) == 0
    return {file.stem: rows_of(file) for file in sorted(output.glob("*.jsonl"))}


def texts(row: dict[str, Any]) -> tuple[str, str]:
    question, answer = Document.from_json(row).turns
    return "".join(p for p in question.parts if isinstance(p, str)), str(answer.parts[0])


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The error: one line, after the progress bars and the rejected records."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medley")]
    assert len(lines) == 1
    return lines[0]
