"""Images to image codes and back, and the fingerprint of the token space.

Shapes: B batch, C image codes of an image in raster order, H and W pixels (both the resolution).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from medley.errors import UserError
from medley.images.preprocess import (
    CHAMELEON_PREPROCESSING,
    PREPROCESSING_VERSION,
    Frame,
    Preprocessing,
    apply_exif_orientation,
    open_image,
    resize_square,
    to_pil,
    to_pixels,
    to_uint8_square,
    uint8_to_pixels,
)
from medley.vqgan.files import open_vqgan
from medley.vqgan.model import TIE, VQGAN
from medley.vqgan.precision import exact_float32
from medley.vqgan.reference import ReferenceEncoder

MAX_MAP_ELEMENTS = 2**31 - 1  # of one feature map: kernels index with 32 bits
MAPS_IN_MEMORY = 6  # feature maps of the largest size at the same time, with a kernel's workspace
MARGIN = 2  # an image's rounding error may be up to this many times the measured one
_FINGERPRINTED = ("encoder.", "quant_conv.", "quantize.")


class ImageTokenizer:
    """A VQGAN with its preprocessing. Without a decoder it encodes images and cannot decode codes.

    `preprocessing` is the way images become squares. It belongs to the checkpoint. The tokenizer
    takes over `vqgan`: it moves and converts the module in place.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        preprocessing: Preprocessing = CHAMELEON_PREPROCESSING,
        has_decoder: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.fingerprint = token_space_fingerprint(vqgan)  # before the dtype changes
        self.device = torch.device(device)
        self.vqgan = vqgan.to_compute(self.device, dtype)
        self.preprocessing = preprocessing
        self.has_decoder = has_decoder
        self.dtype = dtype

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ImageTokenizer:
        """Opens the VQGAN of a checkpoint in any layout, of a folder with a VQGAN, or of `tiny`."""
        return cls(*open_vqgan(path), device, dtype)

    @property
    def size(self) -> int:
        """Width and height in pixels of the square that the VQGAN encodes."""
        return self.vqgan.config.resolution

    @property
    def codes_per_image(self) -> int:
        return self.vqgan.config.codes_per_image

    def open_image(self, path: str | Path, frame: Frame | None = None) -> Image.Image:
        """Reads an image file as RGB, as the preprocessing specifies. Raises ImageError."""
        return open_image(path, frame, self.preprocessing.exif_orientation)

    def square(self, image: Image.Image) -> Image.Image:
        """An RGB image -> the small square that is encoded; the square has the same image codes."""
        return resize_square(self._upright(image), self.size, self.preprocessing.fit)

    def pixels(self, image: Image.Image) -> Tensor:
        """An image of any mode -> float32 (3, size, size) in [-1, 1]."""
        return to_pixels(self._upright(image), self.size, self.preprocessing.fit)

    def _upright(self, image: Image.Image) -> Image.Image:
        """Obeys the EXIF tag that an image opened by the caller still has."""
        return apply_exif_orientation(image) if self.preprocessing.exif_orientation else image

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of any mode and size -> image codes int64 (B, C), on the CPU."""
        fit = self.preprocessing.fit
        squares = [to_uint8_square(self._upright(image), self.size, fit) for image in images]
        return self.encode_bytes(torch.stack(squares)).cpu()

    def encode_bytes(self, squares: Tensor) -> Tensor:
        """Squares uint8 (B, size, size, 3) -> image codes int64 (B, C), on the same device."""
        return self.start_encoding(squares)()

    def start_encoding(self, squares: Tensor) -> Callable[[], Tensor]:
        """Starts `encode_bytes`; returns a function that waits for its result.

        If `squares` is in pinned memory, this method returns before CUDA has finished the work.
        """
        return self._start(uint8_to_pixels(squares.to(self.device, non_blocking=True)))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels float32 (B, 3, H, W) in [-1, 1] -> image codes int64 (B, C).

        In float32, the codes are equal on every device: an image in which two codes are about
        equally near is encoded again in float64.
        """
        return self._start(pixels)()

    @torch.inference_mode()
    def _start(self, pixels: Tensor) -> Callable[[], Tensor]:
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, self.size, self.size):
            raise UserError(
                f"Wrong shape of the pixels (got {tuple(pixels.shape)}, expected (B, 3, "
                f"{self.size}, {self.size}))."
            )
        codes = torch.empty(0, self.codes_per_image, dtype=torch.int64, device=self.device)
        if not len(pixels):
            return lambda: codes
        pixels = pixels.to(self.device, self.dtype, memory_format=torch.channels_last)
        with exact_float32(self.device):
            if self.dtype != torch.float32:
                codes = torch.cat([self.vqgan.encode(part) for part in self._split(pixels)])
                return lambda: codes
            limit = self._tie_limit
            found = [
                self.vqgan.quantize.codes_and_ties(self.vqgan.latents(part), limit)
                for part in self._split(pixels)
            ]
        codes, ties = (torch.cat(tensors) for tensors in zip(*found, strict=True))
        return partial(self._settle_ties, pixels, codes, ties.any(1))

    @torch.inference_mode()
    def _settle_ties(self, pixels: Tensor, codes: Tensor, has_ties: Tensor) -> Tensor:
        """Encodes the images (B,) that have near ties in float64."""
        for index in has_ties.nonzero().squeeze(1).tolist():
            codes[index] = self._reference.codes(pixels[index : index + 1])[0].to(self.device)
        return codes

    def _split(self, batch: Tensor) -> Sequence[Tensor]:
        """Parts of a batch of about equal size that fit in the memory of the device."""
        if self.device.type == "cpu":  # the feature maps of several images exceed its caches
            return torch.split(batch, 1)
        largest = self.vqgan.config.largest_map
        limit = MAX_MAP_ELEMENTS // largest
        if self.device.type == "cuda":
            bytes_per_image = MAPS_IN_MEMORY * largest * self.dtype.itemsize
            limit = min(limit, _free_cuda_memory(self.device) // bytes_per_image)
        return torch.tensor_split(batch, -(-len(batch) // max(1, limit)))

    @cached_property
    def _reference(self) -> ReferenceEncoder:
        return ReferenceEncoder(self.vqgan, self.device)

    @cached_property
    def _tie_limit(self) -> float:
        """Relative difference of two distances that rounding on this device may reverse."""
        return TIE if self.device.type in ("cpu", "meta") else self._measure_tie_limit()

    def _measure_tie_limit(self) -> float:
        """TIE was measured on CPUs. The kernels of other devices add in other orders.

        Measures the rounding on noise and on a smooth image.
        """
        noise = torch.rand(3, self.size, self.size, generator=torch.Generator().manual_seed(0))
        smooth = torch.linspace(0, 1, self.size).expand_as(noise)
        pixels = (torch.stack([noise, smooth]) * 2 - 1).to(self.device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        latents = self.vqgan.latents(pixels)
        error = self._reference.rounding_error(pixels, latents, self.vqgan.quantize)
        return max(TIE, MARGIN * error)

    def decode(self, codes: Tensor | Sequence[Sequence[int]]) -> list[Image.Image]:
        """Image codes (B, C), each valid -> images."""
        return [to_pil(one) for one in self.decode_pixels(torch.as_tensor(codes))]

    def require_decoder(self) -> None:
        """Raises UserError if the VQGAN has no decoder to generate images with."""
        if not self.has_decoder:
            raise UserError(
                "This checkpoint has no VQGAN decoder and cannot generate images. Name a folder "
                "that contains vqgan.yaml and vqgan.ckpt with --vqgan."
            )

    @torch.inference_mode()
    def decode_pixels(self, codes: Tensor) -> Tensor:
        """Image codes int64 (B, C) -> pixels float32 (B, 3, H, W), about [-1, 1], not clamped."""
        self.require_decoder()
        config = self.vqgan.config
        if codes.ndim != 2 or codes.shape[1] != config.codes_per_image:
            raise UserError(
                f"Wrong shape of the image codes (got {tuple(codes.shape)}, expected (B, "
                f"{config.codes_per_image}))."
            )
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < config.n_embed):
            raise UserError(
                f"Image codes out of range (got {int(codes.min())} to {int(codes.max())}, "
                f"expected 0 to {config.n_embed - 1})."
            )
        codes = codes.to(self.device).long()
        if not len(codes):
            return torch.empty(0, config.out_ch, self.size, self.size, device=self.device)
        with exact_float32(self.device):
            return torch.cat([self.vqgan.decode(part).float() for part in self._split(codes)])


def _free_cuda_memory(device: torch.device) -> int:
    """Free bytes, with those that torch has reserved and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def token_space_fingerprint(vqgan: VQGAN) -> str:
    """SHA-256 that identifies the meaning of the image codes.

    It covers the encoder, quant_conv and the codebook in float32, sorted by name, and the version
    of the preprocessing. The decoder has no influence on the codes and is left out.
    """
    digest = hashlib.sha256(f"preprocessing {PREPROCESSING_VERSION}".encode())
    for name, tensor in sorted(vqgan.state_dict().items()):
        if name.startswith(_FINGERPRINTED):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
