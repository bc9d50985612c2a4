"""What a request may ask of generation. The defaults are Chameleon's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from medley.errors import UserError

Mode = Literal["any", "text", "image"]
COLDEST = 0.001  # a temperature below would overflow; what it means is greedy


def _divides(temperature: float) -> bool:
    return COLDEST <= temperature < math.inf


@dataclass(frozen=True)
class GenerationOptions:
    """How one row is generated.

    `mode` is `any` (text and pictures in any order), `text`, or `image` (pictures alone, at
    least one). A top-k of 0 keeps all. `stop` are ids of text pieces that end the answer, beside
    `</s>` and the end of the turn. The repetition penalty acts on text pieces, over prompt and
    output. Guidance scales weigh the words and the pictures of the context while codes are drawn.
    """

    mode: Mode = "any"
    max_new_tokens: int = 4096
    seed: int = 0
    text_greedy: bool = False
    text_temperature: float = 0.7
    text_top_p: float = 0.9
    text_top_k: int = 0
    repetition_penalty: float = 1.2
    image_greedy: bool = False
    image_temperature: float = 0.7
    image_top_p: float = 0.9
    image_top_k: int = 0
    guidance_scale_text: float = 3.0
    guidance_scale_image: float = 1.2
    min_images: int = 0
    max_images: int | None = None
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks = [
            ("mode", self.mode in ("any", "text", "image"), "any, text or image"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**63, "0 or more, below 2**63"),
            (
                "text_temperature",
                _divides(self.text_temperature),
                f"{COLDEST} or more, finite (or text_greedy)",
            ),
            (
                "image_temperature",
                _divides(self.image_temperature),
                f"{COLDEST} or more, finite (or image_greedy)",
            ),
            ("text_top_p", 0 < self.text_top_p <= 1, "above 0, at most 1"),
            ("image_top_p", 0 < self.image_top_p <= 1, "above 0, at most 1"),
            ("text_top_k", 0 <= self.text_top_k < 2**31, "0 (all) or more, below 2**31"),
            ("image_top_k", 0 <= self.image_top_k < 2**31, "0 (all) or more, below 2**31"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            ("guidance_scale_text", math.isfinite(self.guidance_scale_text), "a finite number"),
            ("guidance_scale_image", math.isfinite(self.guidance_scale_image), "a finite number"),
            ("min_images", self.min_images >= 0, "0 or more"),
            (
                "max_images",
                self.max_images is None or self.max_images >= max(self.min_images, self._least),
                f"at least {max(self.min_images, self._least)} (min_images, and mode {self.mode})",
            ),
        ]
        for name, good, limit in checks:
            if not good:
                raise UserError(f"{name} is {getattr(self, name)!r}, expected {limit}")
        if self.mode == "text" and self.min_images:
            raise UserError(f"min_images is {self.min_images}, but mode text draws no pictures")

    @property
    def _least(self) -> int:
        return 1 if self.mode == "image" else 0

    @property
    def images_wanted(self) -> int:
        """Pictures that have to come: `min_images`, and one at least in mode `image`."""
        return max(self.min_images, self._least)

    @property
    def guided(self) -> bool:
        return not (self.guidance_scale_text == 1 and self.guidance_scale_image == 1)
