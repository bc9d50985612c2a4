from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medley.images.preprocess import (
    ImageError,
    Preprocessing,
    open_image,
    to_pil,
    to_pixels,
    to_rgb,
    uint8_to_pixels,
)
from medley.vqgan import VQGAN, VQGANConfig
from medley.vqgan.image_tokenizer import ImageTokenizer

SMALL = ImageTokenizer(VQGAN(VQGANConfig(32, (1, 1, 1), 1, 32, 8, 8, 128)))
CASES = [c for c in golden("medmax_image_preprocess.json")["cases"] if c["input"]["png"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_pixels_equal_recorded(case: Any, exceptions: dict[str, dict[str, str]]) -> None:
    expected = case["expected"]["inference_path_open_whiten"]
    image = open_image(GOLDEN / case["input"]["png"])
    pixels = to_pixels(image, expected["shape"][1])
    digest = hashlib.sha256(pixels.numpy().astype("<f4").tobytes()).hexdigest()
    refused = case["id"] in exceptions["medmax_image_preprocess"]
    assert (digest == expected["sha256_float32_le_chw"]) != refused
    assert pixels.dtype == torch.float32


def test_16_bit_images_are_windowed_not_saturated() -> None:
    image = open_image(GOLDEN / "images" / "i16_full_range_65x45.png")
    values = np.asarray(image)
    assert values.min() == 0
    assert values.max() == 255
    assert len(np.unique(values)) > 100


def test_images_from_pixels_equal_recorded() -> None:
    case = golden("medmax_sequence_and_vocab.json")["pixels_to_uint8"][0]
    pixels = torch.tensor(case["input"]["chw"], dtype=torch.float32)
    assert np.asarray(to_pil(pixels)).tolist() == case["expected"]["hwc_uint8"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp", "gif"])
def test_common_formats_are_read(tmp_path: Path, suffix: str) -> None:
    values = np.tile(np.array([0, 255], np.uint8).repeat(8), (16, 1))
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(values).save(path)
    pixels = np.asarray(open_image(path)).astype(int)
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels - values[..., None]).max() < 16


def test_first_image_of_animation_is_read_and_tiff_stack_needs_a_frame(
    tmp_path: Path,
) -> None:
    black, white = Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 255)
    black.save(tmp_path / "a.gif", save_all=True, append_images=[white])
    assert np.asarray(open_image(tmp_path / "a.gif")).max() == 0
    black.save(tmp_path / "a.tif", save_all=True, append_images=[white])
    with pytest.raises(ImageError, match="has 2 frames"):
        open_image(tmp_path / "a.tif")
    assert np.asarray(open_image(f"{tmp_path}/a.tif#1")).min() == 255


def test_exif_orientation_is_applied_only_on_request(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (20, 10)
    assert open_image(tmp_path / "a.jpg", exif_orientation=True).size == (10, 20)


def test_decompression_bomb_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr("medley.images.formats.MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"bomb\.png: .*too many pixels \(got 100 x 100"):
        open_image(tmp_path / "bomb.png")


def test_uint8_to_pixels_is_exact() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    expected = (np.arange(256) / 255.0 * 2.0 - 1.0).astype(np.float32)
    assert uint8_to_pixels(values)[0, 1].reshape(-1).tolist() == expected.tolist()


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]),
    fit=st.sampled_from(["crop", "pad"]),
)
def test_any_size_and_mode_is_encoded_or_raises_image_error(
    width: int, height: int, mode: str, fit: Any
) -> None:
    image = Image.new(mode, (width, height))
    SMALL.preprocessing = Preprocessing(fit)
    try:
        codes = SMALL.encode([image])
    except ImageError:
        assert max(width, height) > 200 * min(width, height)
        return
    assert codes.shape == (1, 64)
    assert bool(((codes >= 0) & (codes < 128)).all())
    pixels = to_pixels(image, 32, fit)
    assert pixels.shape == (3, 32, 32)
    assert bool(((pixels >= -1) & (pixels <= 1)).all())


def test_pad_keeps_the_complete_image() -> None:
    image = Image.new("RGB", (100, 50), "white")
    padded = to_pixels(image, 32, "pad")
    assert float(padded[:, 0].max()) == -1  # black above
    assert float(padded[:, 16].min()) == 1


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_error_names_the_broken_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=r"broken\.png"):
        open_image(path)


def test_truncated_file_raises(tmp_path: Path) -> None:
    complete = (GOLDEN / "images" / "rgb_exact_512.png").read_bytes()
    path = tmp_path / "truncated.png"
    path.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(ImageError, match=r"truncated\.png"):
        open_image(path)


def test_transparency_is_blended_on_white() -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert np.asarray(to_rgb(clear)).min() == 255
