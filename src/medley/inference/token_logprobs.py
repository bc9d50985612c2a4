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
from medley.generation.decoder import Decoder

_BLOCK = 256  # positions whose logits (V floats each) are computed at a time


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability, and the `top` most probable tokens there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@torch.inference_mode()
def token_logprobs(decoder: Decoder, ids: Sequence[int], top: int = 0) -> list[TokenLogprob]:
    """Token ids (S) -> the log probabilities of the tokens from the second one on (S - 1).

    Raises UserError if the model's logits are NaN or infinite.
    """
    device = decoder.model.embed_tokens.weight.device
    tokens = torch.tensor([list(ids)], device=device)
    stack: Any = decoder.model
    hidden = stack(input_ids=tokens, use_cache=False).last_hidden_state[0, :-1]
    targets, rows = tokens[0, 1:], []
    for start in range(0, len(targets), _BLOCK):
        block = slice(start, start + _BLOCK)
        logprobs = decoder.lm_head(hidden[block]).float().log_softmax(-1)
        own = logprobs.gather(1, targets[block, None].to(logprobs.device))[:, 0].tolist()
        values, indices = (part.tolist() for part in logprobs.topk(top))
        if not all(value == value for value in own):
            raise UserError("The model's logits are NaN or infinite.")
        for token, value, index, best in zip(
            targets[block].tolist(), own, indices, values, strict=True
        ):
            rows.append(TokenLogprob(token, value, tuple(zip(index, best, strict=True))))
    return rows
