"""Decoding grammar: which tokens may come next in one sequence.

In the text state: text tokens, the two terminators (`</s>` and end of turn), and the
begin-of-image token if a complete image still fits. In the image state: image tokens, exactly as
many as one image has, and then the end-of-image token. The output is well-formed for any logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from medley.data.vocabulary import Vocabulary
from medley.generation.config import GenerationOptions


@dataclass(frozen=True)
class TokenMasks:
    """Boolean masks (V,) over the vocabulary, built once for each model."""

    vocabulary: Vocabulary
    size: int  # the model's vocabulary size, which may exceed the tokenizer's
    device: torch.device
    codebook_size: int | None = None  # of the VQGAN; None: one vector for each image token

    @cached_property
    def decodable_image_tokens(self) -> range:
        """Ids of the image tokens that the VQGAN can decode to pixels."""
        tokens = self.vocabulary.image_codes
        return tokens if self.codebook_size is None else tokens[: self.codebook_size]

    @cached_property
    def text(self) -> Tensor:
        """Text tokens only."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[[i for i in self.vocabulary.text_tokens if i < self.size]] = True
        return mask.to(self.device)

    @cached_property
    def terminators(self) -> Tensor:
        return self._only(self.vocabulary.eos, self.vocabulary.end_turn)

    @cached_property
    def begin_image(self) -> Tensor:
        return self._only(self.vocabulary.begin_image)

    @cached_property
    def image_tokens(self) -> Tensor:
        mask = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        mask[self.decodable_image_tokens.start : self.decodable_image_tokens.stop] = True
        return mask

    @cached_property
    def begin_image_or_terminator(self) -> Tensor:
        """Another image or the end, where text is not allowed."""
        return self.begin_image | self.terminators

    def text_state(self, begin_image: bool, terminators: bool) -> Tensor:
        """Text tokens, optionally with the begin-of-image token and the terminators."""
        return self._text_states[begin_image, terminators]

    @cached_property
    def _text_states(self) -> dict[tuple[bool, bool], Tensor]:
        masks = {}
        for begin_image in (False, True):
            for terminators in (False, True):
                mask = self.text.clone()
                if begin_image:
                    mask |= self.begin_image
                if terminators:
                    mask |= self.terminators
                masks[begin_image, terminators] = mask
        return masks

    def _only(self, *ids: int) -> Tensor:
        mask = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        mask[list(ids)] = True
        return mask


@dataclass
class DecodingGrammar:
    """The grammar state of one sequence. Only `start` and `advance` change it."""

    vocabulary: Vocabulary
    options: GenerationOptions
    codes_per_image: int
    tokens_left: int  # number of tokens that the sequence may still get
    images: int = 0  # complete images so far
    codes_emitted: int | None = None  # image tokens of the current image; None in the text state
    finish_reason: str | None = None  # "end" (terminator), "stop" or "length"
    image_blocked: bool = False  # an image was allowed, but too few tokens were left for it

    # --- predicates: these change nothing -------------------------------------------------

    @property
    def tokens_per_image(self) -> int:
        return self.codes_per_image + 2

    @property
    def in_image(self) -> bool:
        return self.codes_emitted is not None

    @property
    def image_allowed(self) -> bool:
        """Whether the options allow another image and a complete one fits."""
        return self._image_permitted and self.tokens_left >= self.tokens_per_image

    @property
    def _image_permitted(self) -> bool:
        limit = self.options.max_images
        return self.options.mode != "text" and (limit is None or self.images < limit)

    def forced_token(self) -> int | None:
        """The only token that may come next, if there is only one."""
        if self.codes_emitted is not None:
            is_complete = self.codes_emitted == self.codes_per_image
            return self.vocabulary.end_image if is_complete else None
        missing = self.options.required_images - self.images
        if missing > 0 and self.image_allowed:
            if self.options.mode == "image":
                return self.vocabulary.begin_image
            # One more text token would leave no room for the remaining images.
            if self.tokens_left < missing * self.tokens_per_image + 2:
                return self.vocabulary.begin_image
        return None

    def allowed_tokens(self, masks: TokenMasks) -> Tensor:
        """Mask (V,) of the tokens that may come next if none is forced."""
        if self.in_image:
            return masks.image_tokens
        if self.options.mode == "image":  # required images are forced
            return masks.begin_image_or_terminator
        image_required = self.image_allowed and self.images < self.options.required_images
        allowed = masks.text_state(self.image_allowed, terminators=not image_required)
        if image_required and self.options.stop:  # stop tokens end the response as well
            allowed = allowed.clone()
            allowed[list(self.options.stop)] = False
        return allowed

    def image_skipped_reason(self) -> str | None:
        """Why an image that the options allowed was not generated."""
        required = self.options.required_images
        too_few = self.finish_reason == "length" and self.images < required
        if not (self.image_blocked or too_few) or self.images >= max(1, required):
            return None
        generated = f"{self.images} of {required} images" if self.images else "no image"
        return (
            f"{generated} because a complete image takes {self.tokens_per_image} tokens and fewer "
            "were left of the context or of max_new_tokens"
        )

    # --- state changes --------------------------------------------------------------------

    def start(self) -> None:
        """Ends an images-only sequence immediately if one image does not fit."""
        self._record_blocked_image()
        if self.options.mode == "image" and not self.image_allowed:
            self.finish_reason = "length"

    def advance(self, token: int) -> None:
        """Takes the next token of the sequence."""
        self.tokens_left -= 1
        if token == self.vocabulary.begin_image:
            self.codes_emitted = 0
        elif token == self.vocabulary.end_image:
            self.codes_emitted = None
            self.images += 1
            if self.options.mode == "image":
                self._finish_images()
        elif self.codes_emitted is not None:
            self.codes_emitted += 1
        elif token in (self.vocabulary.eos, self.vocabulary.end_turn):
            self.finish_reason = "end"
        elif token in self.options.stop:
            self.finish_reason = "stop"
        if self.tokens_left <= 0 and self.finish_reason is None:
            self.finish_reason = "length"
        if self.finish_reason is None and not self.in_image:
            self._record_blocked_image()

    def _finish_images(self) -> None:
        """Ends an images-only sequence after its last image."""
        if self.images >= (self.options.max_images or self.options.required_images):
            self.finish_reason = "stop"
        elif not self.image_allowed:
            self._record_blocked_image()
            self.finish_reason = "length"

    def _record_blocked_image(self) -> None:
        if self._image_permitted and self.tokens_left < self.tokens_per_image:
            self.image_blocked = True
