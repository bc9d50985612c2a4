"""What the engine holds of a request while it works on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from medley.generation.config import GenerationOptions
from medley.generation.grammar import Grammar


@dataclass(frozen=True)
class Request:
    """Prompt ids of one row and how it is to be continued; `row` seeds its randomness.

    `keep` has the engine remember the whole context, so that a prompt that goes on from it is not
    read again.
    """

    prompt: Sequence[int]
    options: GenerationOptions
    row: int = 0
    keep: bool = False


@dataclass
class GenerationOutput:
    """What came out of a row: new ids without prompt, why it ended, why no picture came."""

    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    note: str | None = None


@dataclass(eq=False)
class CFGBranch:
    """A slot of the cache, and how many tokens it has read."""

    slot: int
    length: int


@dataclass(eq=False)
class SequenceState:
    """A request at work: its grammar, its streams, and what it reads next.

    `image_cond` and `uncond` are there while it draws a picture with guidance.
    """

    ticket: int
    request: Request
    grammar: Grammar
    full: CFGBranch
    seen: Tensor  # bool (V,): text pieces of prompt and output
    logits: Tensor | None  # (V,): those of the prompt, until the first token is chosen
    image_cond: CFGBranch | None = None
    uncond: CFGBranch | None = None
    next_token: int | None = None
    result: GenerationOutput = field(default_factory=GenerationOutput)

    @property
    def streams(self) -> list[CFGBranch]:
        return [s for s in (self.full, self.image_cond, self.uncond) if s is not None]

    @property
    def ids(self) -> list[int]:
        return [*self.request.prompt, *self.result.ids]
