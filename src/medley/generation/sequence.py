"""Requests, their outputs, and the engine's state of a running sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from medley.generation.config import GenerationOptions
from medley.generation.grammar import DecodingGrammar


@dataclass(frozen=True)
class Request:
    """Prompt token ids and how to continue them.

    `index` selects the random numbers of the sequence, together with `options.seed`.
    `cache_prefix` keeps the keys and values of the complete sequence after it ends, so that a
    prompt that begins with it is not prefilled again.
    """

    prompt: Sequence[int]
    options: GenerationOptions
    index: int = 0
    cache_prefix: bool = False


@dataclass
class GenerationOutput:
    """New token ids without the prompt, why the sequence ended, and why an image is missing.

    `finish_reason` is "end" (`</s>` or end of turn), "stop" (a stop token, or all images of an
    images-only response), "length", or "error" with its message in `error`.
    """

    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    note: str | None = None
    error: str | None = None


class CacheDemand(NamedTuple):
    """Worst case of one sequence: its CFG branches, and the tokens of the longest one."""

    branches: int
    length: int


class Admission(NamedTuple):
    """A request that has a place among the running sequences."""

    ticket: int
    request: Request
    grammar: DecodingGrammar
    demand: CacheDemand


@dataclass(eq=False)
class CFGBranch:
    """One context of a sequence in the key-value cache: its slot, and its length in tokens."""

    slot: int
    length: int


@dataclass(eq=False)
class Prefill:
    """An admitted request whose prompt is not read to its end.

    It takes a slot with the first part of its prompt. `branch.length` tokens have been read.
    """

    admission: Admission
    branch: CFGBranch | None = None

    @property
    def prompt(self) -> Sequence[int]:
        return self.admission.request.prompt

    @property
    def remaining(self) -> int:
        """Tokens of the prompt that have not been read."""
        return len(self.prompt) - (0 if self.branch is None else self.branch.length)

    @property
    def branches(self) -> list[CFGBranch]:
        return [] if self.branch is None else [self.branch]


class PrefillPart(NamedTuple):
    """The next tokens of a prompt that are read in one pass."""

    prefill: Prefill
    num_tokens: int


@dataclass(eq=False)
class SequenceState:
    """A running request: its grammar and its CFG branches.

    `image_cond` (the images of the context only) and `uncond` (an empty context) exist only while
    an image is generated with guidance. `drafts` are guesses of the tokens behind `pending`; they
    are not part of the output.
    """

    ticket: int
    request: Request
    grammar: DecodingGrammar
    demand: CacheDemand
    full: CFGBranch
    seen_text: Tensor  # bool (V,): text tokens of prompt and output, for the repetition penalty
    logits: Tensor | None  # (V,): the prompt's last logits, until the first token is sampled
    image_cond: CFGBranch | None = None
    uncond: CFGBranch | None = None
    drafts: list[int] = field(default_factory=list)
    output: GenerationOutput = field(default_factory=GenerationOutput)

    @property
    def branches(self) -> list[CFGBranch]:
        return [b for b in (self.full, self.image_cond, self.uncond) if b is not None]

    @property
    def cfg_slots(self) -> tuple[int, int, int]:
        """Slots for the full, the image-conditional and the unconditional logits.

        A branch that does not exist is equal to one that does: without images in the context the
        image-conditional branch is the unconditional one; without guidance all three are the full
        one.
        """
        uncond = self.full if self.uncond is None else self.uncond
        return self.full.slot, (self.image_cond or uncond).slot, uncond.slot

    @property
    def ids(self) -> list[int]:
        return [*self.request.prompt, *self.output.ids]

    @property
    def pending(self) -> list[int]:
        """New tokens that have no keys and values yet."""
        return self.output.ids[self.full.length - len(self.request.prompt) :]

    @property
    def position(self) -> int:
        """Position of the next token in the sequence."""
        return len(self.request.prompt) + len(self.output.ids)

    def append(self, token: int) -> None:
        """Adds a new token to the output."""
        self.output.ids.append(token)
        self.logits = None
        if token in self.grammar.vocabulary.text_tokens:
            self.seen_text[token] = True
        self.grammar.advance(token)


class Window(NamedTuple):
    """Input tokens of a sequence in one pass: those pending, then drafts of the tokens to draw."""

    sequence: SequenceState
    tokens: list[int]
    num_draws: int  # tokens to draw: one more than drafts

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_draws + 1

    @property
    def drafts(self) -> list[int]:
        return self.tokens[self.num_pending :]


def image_context(ids: Sequence[int], begin_image: int, end_image: int) -> list[int]:
    """The complete images of a context, each with its begin and end token."""
    context: list[int] = []
    start: int | None = None
    for position, token in enumerate(ids):
        if token == begin_image:
            start = position
        elif token == end_image and start is not None:
            context += ids[start : position + 1]
            start = None
    return context
