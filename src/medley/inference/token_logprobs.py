"""Log probabilities of the tokens of a given sequence, with the most probable alternatives.

They are those of the model's own distribution: no temperature, penalty or grammar.

Shapes: S positions of a sequence, V vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from medley.errors import UserError
from medley.generation import Engine
from medley.generation.sampling import NONFINITE_LOGITS

_BLOCK = 256  # positions whose logits (V floats each) are computed at a time


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability, and the `top` most probable tokens there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@torch.inference_mode()
def token_logprobs(engine: Engine, ids: Sequence[int], top: int = 0) -> list[TokenLogprob]:
    """Token ids (S) -> the log probabilities of the tokens from the second one on (S - 1).

    Raises UserError if the model's logits are NaN or infinite.
    """
    tokens = torch.tensor([list(ids)], device=engine.runner.device)
    stack: Any = engine.decoder.model
    hidden = stack(input_ids=tokens, use_cache=False).last_hidden_state[0, :-1]
    targets, rows = tokens[0, 1:], []
    for start in range(0, len(targets), _BLOCK):
        block = slice(start, start + _BLOCK)
        logprobs = engine.runner.logits(hidden[block], slice(None)).log_softmax(-1)
        own_values = logprobs.gather(1, targets[block, None].to(logprobs.device))[:, 0]
        if not bool(own_values.isfinite().all()):
            raise UserError(NONFINITE_LOGITS)
        own = own_values.tolist()
        values, indices = (part.tolist() for part in logprobs.topk(top))
        for token, value, index, best in zip(
            targets[block].tolist(), own, indices, values, strict=True
        ):
            rows.append(TokenLogprob(token, value, tuple(zip(index, best, strict=True))))
    return rows
