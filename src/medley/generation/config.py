"""Generation options of one request.

The defaults are Chameleon's. Command-line flags and server requests refer to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypedDict

from medley.errors import UserError

Mode = Literal["any", "text", "image"]
MIN_TEMPERATURE = 0.001  # logits / temperature may overflow below it; use greedy decoding instead


@dataclass(frozen=True)
class GenerationOptions:
    """How one sequence is generated.

    `mode` is `any` (text and images in any order), `text`, or `image` (images only, at least
    one). A top-k of 0 keeps all tokens. `stop` contains ids of text tokens that end the response,
    in addition to `</s>` and the end-of-turn token. The repetition penalty applies to the text
    tokens of prompt and output. The guidance scales weight the text and the images of the context
    while image tokens are sampled.
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
        temperature = f"{MIN_TEMPERATURE} or more, finite"
        checks = [
            ("mode", self.mode in ("any", "text", "image"), "any, text or image"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**63, "0 or more, below 2**63"),
            (
                "text_temperature",
                MIN_TEMPERATURE <= self.text_temperature < math.inf,
                f"{temperature} (or text_greedy)",
            ),
            (
                "image_temperature",
                MIN_TEMPERATURE <= self.image_temperature < math.inf,
                f"{temperature} (or image_greedy)",
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
                self.max_images is None or self.max_images >= self.required_images,
                f"at least {self.required_images} (min_images, and mode {self.mode})",
            ),
        ]
        for name, is_valid, expected in checks:
            if not is_valid:
                raise UserError(f"{name} is {getattr(self, name)!r}, expected {expected}")
        if self.mode == "text" and self.min_images:
            raise UserError(
                f"min_images is {self.min_images}, but mode text generates no images. "
                "Use mode any or image."
            )

    @property
    def required_images(self) -> int:
        """Minimum number of images: `min_images`, and at least one in mode `image`."""
        return max(self.min_images, 1 if self.mode == "image" else 0)

    @property
    def uses_cfg(self) -> bool:
        """Whether image tokens are sampled with classifier-free guidance."""
        return not (self.guidance_scale_text == 1 and self.guidance_scale_image == 1)


class GenerationKeywords(TypedDict, total=False):
    """Keyword arguments of `Model.generate`: the fields of `GenerationOptions` without `mode`."""

    max_new_tokens: int
    seed: int
    text_greedy: bool
    text_temperature: float
    text_top_p: float
    text_top_k: int
    repetition_penalty: float
    image_greedy: bool
    image_temperature: float
    image_top_p: float
    image_top_k: int
    guidance_scale_text: float
    guidance_scale_image: float
    min_images: int
    max_images: int | None
    stop: tuple[int, ...]
