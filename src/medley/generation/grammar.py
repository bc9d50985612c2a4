"""The grammar of an answer: which tokens may come next, one state a row.

In the text state: text pieces, the two ends of an answer, and the begin mark where a whole
picture still fits. In the image state: image codes, exactly as many as a picture has, and
then the end mark. Whatever the logits are, what comes out is well-formed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from medley.data.vocabulary import Vocabulary
from medley.generation.config import GenerationOptions


@dataclass(frozen=True)
class TokenMasks:
    """Boolean masks (V,) over the vocabulary, made once a model."""

    vocabulary: Vocabulary
    size: int  # of the model's vocabulary, which may be larger than the tokenizer's
    device: torch.device
    codebook: int | None = None  # vectors of the VQGAN's codebook; None: one for each image code

    @cached_property
    def decodable_image_tokens(self) -> range:
        """Ids of the image codes that the VQGAN can turn into pixels."""
        codes = self.vocabulary.image_codes
        return codes if self.codebook is None else codes[: self.codebook]

    @cached_property
    def text(self) -> Tensor:
        """Text pieces, and nothing else."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[[i for i in self.vocabulary.text_tokens if i < self.size]] = True
        return mask.to(self.device)

    @cached_property
    def ends(self) -> Tensor:
        return self._only(self.vocabulary.eos, self.vocabulary.end_turn)

    @cached_property
    def begin_image(self) -> Tensor:
        return self._only(self.vocabulary.begin_image)

    @cached_property
    def codes(self) -> Tensor:
        mask = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        mask[self.decodable_image_tokens.start : self.decodable_image_tokens.stop] = True
        return mask

    def words(self, begin_image: bool, ends: bool) -> Tensor:
        """Text pieces, with the mark that begins a picture and those that end an answer."""
        return self._words[begin_image, ends]

    @cached_property
    def images_or_end(self) -> Tensor:
        """Another picture or the end, where no words are wanted."""
        return self.begin_image | self.ends

    @cached_property
    def _words(self) -> dict[tuple[bool, bool], Tensor]:
        found = {}
        for begin in (False, True):
            for end in (False, True):
                mask = self.text.clone()
                mask |= self.begin_image if begin else False
                found[begin, end] = mask | self.ends if end else mask
        return found

    def _only(self, *ids: int) -> Tensor:
        mask = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        mask[list(ids)] = True
        return mask


@dataclass
class Grammar:
    """The state of one row. `room` is how many more tokens it may take in."""

    vocabulary: Vocabulary
    options: GenerationOptions
    codes_per_image: int
    room: int
    images: int = 0
    drawn: int | None = None  # codes drawn of the current picture; None in the text state
    finished: str | None = None  # why the row ended: "end", "stop", "length" or "images"
    image_blocked: bool = field(default=False)  # a picture was allowed but had no room

    @property
    def tokens_per_image(self) -> int:
        return self.codes_per_image + 2

    @property
    def in_image(self) -> bool:
        return self.drawn is not None

    def forced(self) -> int | None:
        """The only token that may come next, where there is one."""
        if self.drawn is not None:
            return self.vocabulary.end_image if self.drawn == self.codes_per_image else None
        missing = self.options.images_wanted - self.images
        if missing > 0 and self._picture_allowed():
            if self.options.mode == "image":
                return self.vocabulary.begin_image
            if self.room < missing * self.tokens_per_image + 2:  # a word more, and they do not fit
                return self.vocabulary.begin_image
        return None

    def allowed(self, classes: TokenMasks) -> Tensor:
        """Mask (V,) of the tokens that may come next, where none is forced."""
        if self.in_image:
            return classes.codes
        if self.options.mode == "image":  # those that have to come are forced
            return classes.images_or_end
        picture = self._picture_allowed()
        missing = picture and self.images < self.options.images_wanted
        allowed = classes.words(picture, not missing)
        if missing and self.options.stop:  # these end an answer, too
            allowed = allowed.clone()
            allowed[list(self.options.stop)] = False
        return allowed

    def _picture_allowed(self) -> bool:
        options = self.options
        if options.mode == "text":
            return False
        if options.max_images is not None and self.images >= options.max_images:
            return False
        if self.room < self.tokens_per_image:
            self.image_blocked = True
            return False
        return True

    def start(self) -> None:
        """Ends a row at once that may only draw pictures and has no room for one."""
        if self.options.mode == "image" and not self._picture_allowed():
            self.finished = "length"

    def take(self, token: int) -> None:
        """Moves on by one token."""
        self.room -= 1
        if token == self.vocabulary.begin_image:
            self.drawn = 0
        elif token == self.vocabulary.end_image:
            self.drawn = None
            self.images += 1
            enough = self.images >= (self.options.max_images or self.options.images_wanted)
            if self.options.mode == "image" and (enough or not self._picture_allowed()):
                self.finished = "images" if enough else "length"
        elif self.drawn is not None:
            self.drawn += 1
        elif token in (self.vocabulary.eos, self.vocabulary.end_turn):
            self.finished = "end"
        elif token in self.options.stop:
            self.finished = "stop"
        if self.room <= 0 and self.finished is None:
            self.finished = "length"

    def image_skipped_reason(self) -> str | None:
        """Why a picture that could have come did not."""
        short = self.finished == "length" and self.images < self.options.images_wanted
        if not (self.image_blocked or short) or self.images >= max(1, self.options.images_wanted):
            return None
        came = (
            f"{self.images} of {self.options.images_wanted} images" if self.images else "no image"
        )
        return (
            f"{came} because a whole picture takes {self.tokens_per_image} tokens and fewer were "
            "left of the context or of max_new_tokens"
        )
