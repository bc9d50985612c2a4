"""Log-likelihoods of given continuations of prompts: the choices of a question.

A prompt is read once. All its choices are then read in one row, at the positions that follow the
prompt: each sees the keys and values of the prompt and its own tokens, and none of the others.

Shapes: B prompts, P longest prompt, C choice tokens of a prompt in one pass, K choices, N predicted
tokens, H key-value heads, T new tokens, W head width, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from medley.errors import UserError
from medley.generation.engine import Engine
from medley.generation.out_of_memory import is_out_of_memory, release_unused_memory
from medley.generation.sampling import NONFINITE_LOGITS

END = -1  # as a target: the end of the response, by whichever token
MAX_CHOICE_TOKENS = 256  # of one prompt in one pass, unless a single choice is longer
_STATES = 256  # whose logits are computed at a time


class Continuations(NamedTuple):
    """Token ids of a prompt and of its choices."""

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Cache positions that one pass may need."""
        longest = max(map(len, self.choices))
        return len(self.prompt) + max(longest, min(MAX_CHOICE_TOKENS, sum(map(len, self.choices))))


class PromptCache(DynamicCache):  # type: ignore[misc]  # transformers' classes are not typed
    """Keys and values of prompts.

    The first pass writes them. Later ones read them, and what these add is not kept: a pass that
    does not write needs a 4-D mask, with which transformers asks the cache for no lengths.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_read = False  # whether the prompts are
        self._prompts: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys and values (B, H, T, W) -> those of the prompt and the new ones."""
        if not self.is_read:
            pair = super().update(key_states, value_states, layer_idx, *rest, **named)
            self._prompts[layer_idx] = pair
            return self._prompts[layer_idx]
        keys, values = self._prompts[layer_idx]
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)


def log_likelihoods(
    engine: Engine, questions: Sequence[Continuations], with_end: bool, batch_size: int
) -> list[list[float] | str]:
    """The natural logarithm of the likelihood of each choice of each question, in their order.

    `with_end` includes the end of the response: the probability of either token that ends one, that
    is `</s>` or the end-of-turn token. A question that does not fit into the memory has the reason
    instead. Questions of similar lengths share a batch. Raises UserError if the model's logits are
    NaN or infinite.
    """
    results: list[list[float] | str] = [""] * len(questions)
    for batch in _batches(engine, questions, batch_size):
        rows = _with_memory(engine, [questions[number] for number in batch], with_end)
        for number, row in zip(batch, rows, strict=True):
            results[number] = row
    return results


def _batches(
    engine: Engine, questions: Sequence[Continuations], batch_size: int
) -> Iterator[list[int]]:
    """Numbers of the questions of each batch, longest first, within the cache's memory."""
    limit = engine.budget.cache_bytes
    batch: list[int] = []
    longest = 0
    for number in sorted(range(len(questions)), key=lambda n: -questions[n].length):
        longest = longest if batch else questions[number].length
        nbytes = (len(batch) + 1) * longest * engine.budget.bytes_per_token
        if batch and (len(batch) >= batch_size or (limit is not None and nbytes > limit)):
            yield batch
            batch, longest = [], questions[number].length
        batch.append(number)
    if batch:
        yield batch


def _with_memory(
    engine: Engine, questions: Sequence[Continuations], with_end: bool
) -> list[list[float] | str]:
    """A batch. While memory runs out, it is cut into halves; a single question fails."""
    needed = questions[0].length * engine.budget.bytes_per_token
    if len(questions) == 1 and not engine.budget.fits([], needed):  # evicts cached prefixes
        limit = engine.budget.cache_bytes or 0
        return [
            _no_memory(engine, questions[0], f"{needed / 1e9:.3g} GB, {limit / 1e9:.3g} GB are")
        ]
    try:
        return list(_score_batch(engine, questions, with_end))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release_unused_memory(engine.runner.device)
    if len(questions) == 1:
        return [_no_memory(engine, questions[0], "more than is")]
    half = len(questions) // 2
    parts = (questions[:half], questions[half:])
    return [row for part in parts for row in _with_memory(engine, part, with_end)]


def _no_memory(engine: Engine, question: Continuations, needed: str) -> str:
    return (
        f"The question does not fit into the memory of {engine.runner.device}: the keys and values "
        f"of {question.length} tokens need {needed} free. Shorten the prompt or the choices, or "
        "raise --kv_cache_gb or --gpu_memory_utilization."
    )


# --- forward passes ---------------------------------------------------------------------------


@torch.inference_mode()
def _score_batch(
    engine: Engine, questions: Sequence[Continuations], with_end: bool
) -> list[list[float]]:
    cache = PromptCache()
    states = _read_prompts(engine, cache, questions)
    most = max(len(question.choices) for question in questions)
    first = [[ids[0] for ids in q.choices] + [0] * (most - len(q.choices)) for q in questions]
    rows = _log_probabilities(engine, states, first)
    sums = [row[: len(q.choices)] for row, q in zip(rows, questions, strict=True)]
    parts = [_parts(question.choices, with_end) for question in questions]
    for turn in range(max(map(len, parts))):
        now = [own[turn] if turn < len(own) else [] for own in parts]
        _add_part(engine, cache, questions, now, with_end, sums)
    return sums


def _read_prompts(engine: Engine, cache: PromptCache, questions: Sequence[Continuations]) -> Tensor:
    """Reads the prompts, right-padded; the state behind the last token of each, (B, D).

    No token sees the padding behind it, so that causal attention needs no mask.
    """
    device, pad = engine.runner.device, engine.vocabulary.pad
    lengths = [len(question.prompt) for question in questions]
    longest = max(lengths)
    ids = torch.tensor(
        [[*q.prompt, *[pad] * (longest - len(q.prompt))] for q in questions], device=device
    )
    positions = torch.arange(longest, device=device).expand_as(ids)
    hidden = _run(engine, ids, positions, None, cache)
    cache.is_read = True
    rows = torch.arange(len(questions), device=hidden.device)
    return hidden[rows, torch.tensor(lengths, device=hidden.device) - 1]


def _parts(choices: Sequence[Sequence[int]], with_end: bool) -> list[list[int]]:
    """Numbers of the choices that share a pass. A choice that is not read is in none."""
    parts: list[list[int]] = [[]]
    tokens = 0
    for number, ids in enumerate(choices):
        count = len(ids) if with_end else len(ids) - 1
        if not count:  # its only token is predicted from the prompt
            continue
        if parts[-1] and tokens + count > MAX_CHOICE_TOKENS:
            parts.append([])
            tokens = 0
        parts[-1].append(number)
        tokens += count
    return parts


def _add_part(
    engine: Engine,
    cache: PromptCache,
    questions: Sequence[Continuations],
    numbers: Sequence[Sequence[int]],
    with_end: bool,
    sums: list[list[float]],
) -> None:
    """Adds the log-likelihoods of all tokens but the first one of some choices of each question."""
    # Each token that is read: its number of the choice, its offset, itself, and what follows it.
    table = [
        [
            (number, offset, pair)
            for number in own
            for offset, pair in enumerate(_pairs(question.choices[number], with_end))
        ]
        for question, own in zip(questions, numbers, strict=True)
    ]
    width = max(map(len, table))
    if not width:
        return
    device = engine.runner.device
    filler = (-1, 0, (engine.vocabulary.pad, END))
    padded = [[*row, *[filler] * (width - len(row))] for row in table]
    owner = torch.tensor([[number for number, _, _ in row] for row in padded], device=device)
    offsets = torch.tensor([[offset for _, offset, _ in row] for row in padded], device=device)
    ids = torch.tensor([[pair[0] for _, _, pair in row] for row in padded], device=device)
    lengths = torch.tensor([len(question.prompt) for question in questions], device=device)
    mask = _mask(owner, lengths, int(lengths.max()))
    hidden = _run(engine, ids, lengths[:, None] + offsets, mask, cache)
    states = torch.cat([hidden[row, : len(own)] for row, own in enumerate(table)])
    targets = [[pair[1]] for row in table for _, _, pair in row]
    values = iter(_log_probabilities(engine, states, targets))
    for row, own in enumerate(table):
        for number, _, _ in own:
            sums[row][number] += next(values)[0]


def _pairs(choice: Sequence[int], with_end: bool) -> Iterator[tuple[int, int]]:
    """The tokens of a choice that are read, each with the one that follows it."""
    followers = [*choice[1:], END] if with_end else choice[1:]
    return zip(choice, followers, strict=False)


def _mask(owner: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """What the tokens of choices may see, bool (B, 1, C, P + C).

    `owner` int64 (B, C) is the number of the choice of each token, `lengths` (B,) the tokens of the
    prompts.
    """
    width = owner.shape[1]
    prompt = torch.arange(longest, device=owner.device)[None] < lengths[:, None]
    earlier = torch.ones(width, width, dtype=torch.bool, device=owner.device).tril()
    own = (owner[:, :, None] == owner[:, None, :]) & earlier
    return torch.cat([prompt[:, None].expand(-1, width, -1), own], 2)[:, None]


def _run(
    engine: Engine, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: PromptCache
) -> Tensor:
    """Ids and positions int64 (B, T) -> states (B, T, D)."""
    stack: Any = engine.decoder.model  # its type names the engine's own cache
    hidden: Tensor = stack(
        input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache,
        use_cache=True,
    ).last_hidden_state  # fmt: skip
    return hidden


def _log_probabilities(
    engine: Engine, states: Tensor, targets: Sequence[Sequence[int]]
) -> list[list[float]]:
    """States (N, D) and tokens or END (N, K) -> log-probabilities over the whole vocabulary."""
    vocabulary = engine.vocabulary
    results: list[list[float]] = []
    for start in range(0, len(targets), _STATES):
        logits = engine.runner.logits(states[start : start + _STATES], slice(None))
        logprobs = logits.log_softmax(-1)
        wanted = torch.tensor(targets[start : start + _STATES], device=logprobs.device)
        values = logprobs.gather(1, wanted.clamp(min=0))
        end = torch.logaddexp(logprobs[:, vocabulary.eos], logprobs[:, vocabulary.end_turn])
        values = torch.where(wanted == END, end[:, None], values)
        if not values.isfinite().all():
            raise UserError(NONFINITE_LOGITS)
        results += values.tolist()
    return results
