"""The VQGAN: images to image codes and back, with the published names of its weights.

Architecture and names follow taming-transformers (`vqgan.yaml`, `vqgan.ckpt`), as in Chameleon:
encoder, `quant_conv`, a codebook, `post_quant_conv`, decoder.

Shapes: B batch, C image codes of an image (h * w), H and W pixels, h and w positions of the
feature map, E codebook width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medley.errors import UserError
from medley.utils.config_files import integer, number, shown
from medley.vqgan.group_norm import norm, norm_swish
from medley.vqgan.winograd import Conv3x3

TIE = 2e-6  # measured on CPUs: rounding moves two distances by up to this share of their scale
DISTANCE_ELEMENTS = 1 << 25  # distances in memory at once during quantization: 128 MB of float32

MAX_LEVELS, MAX_RESOLUTION = 16, 1 << 14  # larger ones are errors in a file


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of a VQGAN. The fields have the names of `vqgan.yaml`."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    resolution: int
    z_channels: int
    embed_dim: int
    n_embed: int
    attn_resolutions: tuple[int, ...] = field(default=())
    in_channels: int = 3
    out_ch: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        widths = [self.ch * multiplier for multiplier in self.ch_mult]
        if any(width % 32 for width in [self.ch, *widths]):
            raise ValueError(
                f"VQGAN: Every width must be a multiple of 32 for the group norm (got {widths} "
                f"from ch={self.ch}, ch_mult={list(self.ch_mult)})."
            )
        if self.resolution % self.downsampling:
            raise ValueError(
                f"VQGAN: The resolution must be a multiple of the downsampling factor (got "
                f"{self.resolution} and {self.downsampling} from ch_mult={list(self.ch_mult)})."
            )

    @property
    def downsampling(self) -> int:
        return int(2 ** (len(self.ch_mult) - 1))

    @property
    def grid(self) -> int:
        """Image codes along one side of an image."""
        return self.resolution // self.downsampling

    @property
    def codes_per_image(self) -> int:
        return self.grid**2

    @property
    def largest_map(self) -> int:
        """Elements of the largest feature map of one image, in encoder and decoder."""
        return self.resolution**2 * self.ch * max(self.ch_mult[:2])

    @classmethod
    def checked(cls, where: str, **sizes: Any) -> VQGANConfig:
        """Raises UserError that names `where` for sizes that no VQGAN has."""
        if not sizes["ch_mult"] or len(sizes["ch_mult"]) > MAX_LEVELS:
            raise UserError(
                f"{where}: Invalid ch_mult (got {len(sizes['ch_mult'])} numbers, expected 1 to "
                f"{MAX_LEVELS})."
            )
        integer(where, "resolution", sizes["resolution"], high=MAX_RESOLUTION)
        try:
            return cls(**sizes)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error

    @classmethod
    def from_yaml(cls, parsed: Any, where: str) -> VQGANConfig:
        """Reads the parsed `vqgan.yaml`.

        Raises UserError that names `where` and the field if a size is missing or invalid, or if
        the file requests a feature that Chameleon's tokenizer does not have (double_z).
        """
        model = _mapping(where, "model", parsed.get("model"))
        params = _mapping(where, "model.params", model.get("params"))
        fields = _mapping(where, "model.params.ddconfig", params.get("ddconfig"))

        def sizes(name: str) -> tuple[int, ...]:
            values = fields.get(name)
            if not isinstance(values, list | None):
                raise UserError(f"{where}: Invalid {name} (got {shown(values)}, expected a list).")
            return tuple(integer(where, name, value) for value in values or ())

        if fields.get("double_z"):
            raise UserError(f"{where}: Unsupported double_z (got true, expected false).")
        names = ("ch", "num_res_blocks", "resolution", "z_channels")
        return cls.checked(
            where,
            **{name: integer(where, name, fields.get(name)) for name in names},
            **{name: integer(where, name, params.get(name)) for name in ("embed_dim", "n_embed")},
            **{name: sizes(name) for name in ("ch_mult", "attn_resolutions")},
            in_channels=integer(where, "in_channels", fields.get("in_channels", 3)),
            out_ch=integer(where, "out_ch", fields.get("out_ch", 3)),
            dropout=number(where, "dropout", fields.get("dropout", 0.0), high=1),
        )

    def to_yaml(self) -> dict[str, Any]:
        return {
            "model": {
                "params": {
                    "ckpt_path": "vqgan.ckpt",
                    "ddconfig": {
                        "attn_resolutions": list(self.attn_resolutions),
                        "ch": self.ch,
                        "ch_mult": list(self.ch_mult),
                        "double_z": False,
                        "dropout": self.dropout,
                        "in_channels": self.in_channels,
                        "num_res_blocks": self.num_res_blocks,
                        "out_ch": self.out_ch,
                        "resolution": self.resolution,
                        "z_channels": self.z_channels,
                    },
                    "embed_dim": self.embed_dim,
                    "lossconfig": {"target": "none"},
                    "n_embed": self.n_embed,
                }
            }
        }


def _mapping(where: str, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: Not a VQGAN configuration (got {shown(value)} for {name}, expected a "
            "mapping)."
        )
    return value


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = Conv3x3(channels_in, channels_out)
        self.norm2 = _norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(channels_out, channels_out)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)
        self.changes_width = channels_in != channels_out

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_swish(x, self.norm1))
        h = self.conv2(self.dropout(norm_swish(h, self.norm2)))
        return (self.nin_shortcut(x) if self.changes_width else x) + h


class AttentionBlock(nn.Module):
    """Single-head attention over all positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        normed = norm(x, self.norm)
        q = self.q(normed).reshape(b, c, h * w).transpose(1, 2)
        k = self.k(normed).reshape(b, c, h * w)
        v = self.v(normed).reshape(b, c, h * w)
        weights = torch.softmax(torch.bmm(q, k) * c**-0.5, dim=2)
        mixed = torch.bmm(v, weights.transpose(1, 2)).reshape(b, c, h, w)
        return x + self.proj_out(mixed)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # pads the right and bottom sides only


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution. With `attends`, an attention block follows each of them."""

    downsample: nn.Module
    upsample: nn.Module

    def __init__(self, widths: list[tuple[int, int]], attends: bool, dropout: float) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(a, b, dropout) for a, b in widths)
        self.attn = nn.ModuleList(AttentionBlock(b) for _, b in widths if attends)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, dropout)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) -> latents (B, z_channels, H / downsampling, W / downsampling)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.conv_in = Conv3x3(config.in_channels, config.ch)
        self.down = nn.ModuleList()
        width, resolution = config.ch, config.resolution
        for index, multiplier in enumerate(config.ch_mult):
            out = config.ch * multiplier
            widths = [(width, out)] + [(out, out)] * (config.num_res_blocks - 1)
            level = Level(widths, resolution in config.attn_resolutions, config.dropout)
            width = out
            if index < len(config.ch_mult) - 1:
                level.downsample = Downsample(width)
                resolution //= 2
            self.down.append(level)
        self.mid = Middle(width, config.dropout)
        self.norm_out = _norm(width)
        self.conv_out = Conv3x3(width, config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            assert isinstance(level, Level)
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(norm_swish(self.mid(x), self.norm_out))


class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) -> pixels (B, 3, h * downsampling, w * downsampling)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        width = config.ch * config.ch_mult[-1]
        resolution = config.grid
        self.conv_in = Conv3x3(config.z_channels, width)
        self.mid = Middle(width, config.dropout)
        levels: list[Level] = []
        for index, multiplier in reversed(list(enumerate(config.ch_mult))):
            out = config.ch * multiplier
            # Each level of the decoder has one more block than in the encoder.
            widths = [(width, out)] + [(out, out)] * config.num_res_blocks
            level = Level(widths, resolution in config.attn_resolutions, config.dropout)
            width = out
            if index > 0:
                level.upsample = Upsample(width)
                resolution *= 2
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(width)
        self.conv_out = Conv3x3(width, config.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            assert isinstance(level, Level)
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(norm_swish(x, self.norm_out))


class Quantizer(nn.Module):
    """The codebook: the nearest of `n_embed` vectors in squared Euclidean distance."""

    def __init__(self, n_embed: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def codes(self, z: Tensor) -> Tensor:
        """Latents (B, E, h, w) -> int64 (B, h * w), raster order."""
        return torch.cat([d.argmin(1) for _, d in self.distances(z)]).reshape(z.shape[0], -1)

    def codes_and_ties(self, z: Tensor, limit: float = TIE) -> tuple[Tensor, Tensor]:
        """Image codes, and which of them are near ties, bool (B, h * w).

        In a near tie, the two smallest distances differ by less than `limit` * (|z|^2 + |e|^2), so
        that the order of additions in float32 may decide.
        """
        lengths = (self.embedding.weight**2).sum(1)
        codes, ties = [], []
        for part, distances in self.distances(z):
            nearest, code = distances.min(1)
            scale = (part**2).sum(1) + lengths[code]
            second = distances.scatter_(1, code[:, None], torch.inf).amin(1)
            codes.append(code)
            ties.append(second - nearest < limit * scale)
        return torch.cat(codes).reshape(z.shape[0], -1), torch.cat(ties).reshape(z.shape[0], -1)

    def distances(self, z: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields chunks of latents (N, E) and their squared distances (N, n_embed).

        |z - e|^2 = |z|^2 + |e|^2 - 2 z.e, with one matrix product for each chunk.
        """
        table = self.embedding.weight
        flat = z.permute(0, 2, 3, 1).reshape(-1, table.shape[1])
        lengths = (table**2).sum(1)
        for part in torch.split(flat, max(1, DISTANCE_ELEMENTS // table.shape[0])):
            yield part, (part**2).sum(1, keepdim=True) + lengths - 2 * (part @ table.t())


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. `encode` returns image codes and `decode` takes them."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantize = Quantizer(config.n_embed, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> latents (B, E, h, w) before quantization."""
        return self.quant_conv(self.encoder(pixels).to(self.quant_conv.weight.dtype))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels float (B, 3, H, W) in [-1, 1] -> image codes int64 (B, C)."""
        return self.quantize.codes(self.latents(pixels))

    def decode(self, codes: Tensor) -> Tensor:
        """Image codes int64 (B, C) -> pixels (B, 3, H, W), about [-1, 1], not clamped."""
        b, grid = codes.shape[0], self.config.grid
        quantized = self.quantize.embedding(codes).reshape(b, grid, grid, -1)
        return self.decode_latents(quantized.permute(0, 3, 1, 2).contiguous())

    def decode_latents(self, quantized: Tensor) -> Tensor:
        z = self.post_quant_conv(quantized)
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype))

    def to_compute(self, device: torch.device, dtype: torch.dtype) -> VQGAN:
        """Moves and converts the module in place, for inference only.

        Encoder and decoder get `dtype`. The quantizer stays in float32, because in bfloat16 most
        distances to a real codebook would be equal. Channels last is faster on CPU and GPU and
        gives the same image codes.
        """
        self.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
        for half in (self.encoder, self.decoder):
            half.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in self.modules():
            if isinstance(module, Conv3x3):
                module.freeze()
        return self
