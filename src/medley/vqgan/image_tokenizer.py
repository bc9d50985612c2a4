"""Images to image codes and back, and the fingerprint of the token space.

Shapes: B batch, C image codes of an image in raster order, H and W pixels (both the resolution).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
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
from medley.vqgan.model import VQGAN, Encoder
from medley.vqgan.winograd import Conv3x3

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
        self._reference_encoder: Encoder | None = None

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
        """An RGB image -> the small square that is encoded. Both give the same image codes."""
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
        """Squares uint8 (B, size, size, 3) -> image codes int64 (B, C), on the tokenizer's device.

        If `squares` is in pinned memory, the call returns before CUDA has finished the work.
        """
        return self.encode_pixels(uint8_to_pixels(squares.to(self.device, non_blocking=True)))

    @torch.inference_mode()
    @torch.backends.cudnn.flags(
        enabled=True, allow_tf32=False
    )  # TF32 would change codes near a tie
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels float32 (B, 3, H, W) in [-1, 1] -> image codes int64 (B, C)."""
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, self.size, self.size):
            raise UserError(
                f"Wrong shape of the pixels (got {tuple(pixels.shape)}, expected (B, 3, "
                f"{self.size}, {self.size}))."
            )
        pixels = pixels.to(self.device, self.dtype, memory_format=torch.channels_last)
        if not len(pixels):
            return torch.zeros(0, self.codes_per_image, dtype=torch.int64, device=self.device)
        if self.device.type != "cpu":
            return self.vqgan.encode(pixels)
        # One image at a time: the feature maps of several exceed the caches of a CPU.
        return torch.cat([self._encode_on_cpu(one) for one in torch.split(pixels, 1)])

    def _encode_on_cpu(self, pixels: Tensor) -> Tensor:
        if self.dtype != torch.float32:
            return self.vqgan.encode(pixels)
        codes, ties = self.vqgan.quantize.codes_and_ties(self.vqgan.latents(pixels))
        return self._reference_codes(pixels) if bool(ties.any()) else codes

    def _reference_codes(self, pixels: Tensor) -> Tensor:
        """Image codes by torch's own kernels, channels first.

        Slower, but sums in the same order as Chameleon and therefore resolves near ties equally.
        """
        if self._reference_encoder is None:
            encoder = copy.deepcopy(self.vqgan.encoder)
            encoder = encoder.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            for module in encoder.modules():
                if isinstance(module, Conv3x3):
                    module.thaw()
            self._reference_encoder = encoder
        latents = self.vqgan.quant_conv(self._reference_encoder(pixels.contiguous()))
        return self.vqgan.quantize.codes(latents)

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
        batch_size = 1 if self.device.type == "cpu" else max(1, len(codes))
        batches = torch.split(codes, batch_size)
        return torch.cat([self.vqgan.decode(batch).float() for batch in batches])


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
