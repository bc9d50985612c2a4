"""Pictures to image codes and back, and the fingerprint of the token space.

Shapes: B batch, C codes of a picture in raster order, H and W pixels (both the resolution).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from medley.errors import UserError
from medley.images.preprocess import (
    PREPROCESSING_VERSION,
    Fit,
    bytes_to_pixels,
    resize_square,
    to_pil,
    to_pixels,
    to_uint8_square,
)
from medley.vqgan.model import VQGAN, Encoder
from medley.vqgan.winograd import Conv3x3

_FINGERPRINTED = ("encoder.", "quant_conv.", "quantize.")


class ImageTokenizer:
    """A VQGAN with its preprocessing. Without a decoder it reads pictures and draws none.

    `fit` is how pictures become squares; it belongs to the checkpoint.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        fit: Fit = "crop",
        has_decoder: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.fingerprint = token_space_fingerprint(vqgan)  # before any change of dtype
        self.device = torch.device(device)
        self.vqgan = vqgan.to_compute(self.device, dtype)
        self.fit = fit
        self.has_decoder = has_decoder
        self.dtype = dtype
        self._plain_encoder: Encoder | None = None

    @classmethod
    def from_checkpoint(cls, path: str | Path, **options: Any) -> ImageTokenizer:
        """Opens that of a checkpoint in any layout, of a folder with a VQGAN, or of `tiny`.

        Options are `device` and `dtype`.
        """
        from medley.checkpoints.checkpoint import open_image_tokenizer

        return open_image_tokenizer(path, **options)

    @property
    def size(self) -> int:
        """Pixels along a side of the square that the VQGAN reads."""
        return self.vqgan.config.resolution

    @property
    def codes_per_image(self) -> int:
        return self.vqgan.config.codes_per_image

    def square(self, image: Image.Image) -> Image.Image:
        """An RGB picture as small as it is read: the same codes, however large it was."""
        return resize_square(image, self.size, self.fit)

    def pixels(self, image: Image.Image) -> Tensor:
        """A picture -> float32 (3, size, size) in [-1, 1]."""
        return to_pixels(image, self.size, self.fit)

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any mode and size -> codes int64 (B, C), on the CPU."""
        squares = [to_uint8_square(image, self.size, self.fit) for image in images]
        return self.encode_bytes(torch.stack(squares)).cpu()

    def encode_bytes(self, squares: Tensor) -> Tensor:
        """Squares uint8 (B, size, size, 3) -> codes int64 (B, C), on the tokenizer's device.

        On CUDA it comes back before the work is done, if `squares` lie in pinned memory.
        """
        return self.encode_pixels(bytes_to_pixels(squares.to(self.device, non_blocking=True)))

    @torch.inference_mode()
    @torch.backends.cudnn.flags(
        enabled=True, allow_tf32=False
    )  # TF32 would change codes near a tie
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels float32 (B, 3, H, W) in [-1, 1] -> codes int64 (B, C)."""
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, self.size, self.size):
            raise UserError(
                f"pixels have shape {tuple(pixels.shape)}, expected (B, 3, {self.size}, "
                f"{self.size})"
            )
        pixels = pixels.to(self.device, self.dtype, memory_format=torch.channels_last)
        if not len(pixels):
            return torch.zeros(0, self.codes_per_image, dtype=torch.int64, device=self.device)
        if self.device.type != "cpu":
            return self.vqgan.encode(pixels)
        # One at a time: the maps of several would not stay in a CPU's caches.
        return torch.cat([self._encode_on_cpu(one) for one in torch.split(pixels, 1)])

    def _encode_on_cpu(self, pixels: Tensor) -> Tensor:
        if self.dtype != torch.float32:
            return self.vqgan.encode(pixels)
        codes, ties = self.vqgan.quantize.codes_and_ties(self.vqgan.latents(pixels))
        return self._plain_codes(pixels) if bool(ties.any()) else codes

    def _plain_codes(self, pixels: Tensor) -> Tensor:
        """Codes by the library's own kernels, channels first, as the reference adds things up.

        Slower; it settles near ties the way Chameleon does.
        """
        if self._plain_encoder is None:
            plain = copy.deepcopy(self.vqgan.encoder).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            for module in plain.modules():
                if isinstance(module, Conv3x3):
                    module.thaw()
            self._plain_encoder = plain
        latents = self.vqgan.quant_conv(self._plain_encoder(pixels.contiguous()))
        return self.vqgan.quantize.codes(latents)

    def decode(self, codes: Tensor | Sequence[Sequence[int]]) -> list[Image.Image]:
        """Codes (B, C), each a valid code -> pictures."""
        return [to_pil(one) for one in self.decode_pixels(torch.as_tensor(codes))]

    def require_decoder(self) -> None:
        """Raises UserError where there is no decoder to draw with."""
        if not self.has_decoder:
            raise UserError(
                "this checkpoint carries no VQGAN decoder, so it cannot draw pictures: name a "
                "folder that has vqgan.yaml and vqgan.ckpt with --vqgan"
            )

    @torch.inference_mode()
    def decode_pixels(self, codes: Tensor) -> Tensor:
        """Codes int64 (B, C) -> pixels float32 (B, 3, H, W), about [-1, 1], not clamped."""
        self.require_decoder()
        config = self.vqgan.config
        if codes.ndim != 2 or codes.shape[1] != config.codes_per_image:
            raise UserError(
                f"codes have shape {tuple(codes.shape)}, expected (B, {config.codes_per_image})"
            )
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < config.n_embed):
            raise UserError(
                f"image codes run from {int(codes.min())} to {int(codes.max())}, "
                f"valid are 0 to {config.n_embed - 1}"
            )
        codes = codes.to(self.device).long()
        several = 1 if self.device.type == "cpu" else max(1, len(codes))
        return torch.cat([self.vqgan.decode(part).float() for part in torch.split(codes, several)])


def token_space_fingerprint(vqgan: VQGAN) -> str:
    """SHA-256 that says which pictures and models speak the same codes.

    Over the encoder, quant_conv and codebook in float32, sorted by name, and the version of
    the preprocessing. The decoder does not count: it changes no code.
    """
    digest = hashlib.sha256(f"preprocessing {PREPROCESSING_VERSION}".encode())
    for name, tensor in sorted(vqgan.state_dict().items()):
        if name.startswith(_FINGERPRINTED):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
