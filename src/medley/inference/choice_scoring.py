"""Choice scoring: the log-likelihood of each choice as a model's whole response to a prompt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypedDict

from medley.data.document import Document
from medley.data.vocabulary import TextTokenizer
from medley.errors import UserError
from medley.generation.likelihood import Continuations, log_likelihoods
from medley.inference.interface import GeneratingModel, Prompt

_BATCHES_PER_ROUND = 4  # whose prompts are encoded and sorted by their lengths together
_SHOWN = 60  # characters of a choice in a message


@dataclass(frozen=True)
class ScoringOptions:
    """How choices are scored.

    Attributes:
        per_token: divide the log-likelihood of a choice by its number of tokens
        prior_correction: subtract the log-likelihood of the choice after the same prompt without
            its images
        with_end: score a choice as the whole response. That is the likelihood of its tokens and
            then of `</s>` or the end-of-turn token. Otherwise the response may continue after it,
            and a choice that another one begins with is always the more probable one of the two.
    """

    per_token: bool = False
    prior_correction: bool = False
    with_end: bool = True


class ScoringKeywords(TypedDict, total=False):
    """Keyword arguments of `Model.score`: the fields of `ScoringOptions`."""

    per_token: bool
    prior_correction: bool
    with_end: bool


@dataclass(frozen=True)
class ChoiceScore:
    """The score of a choice.

    Attributes:
        text: the choice
        logprob: natural logarithm of its likelihood, after the options' normalization
        probability: softmax of the choices' `logprob`
    """

    text: str
    logprob: float
    probability: float


ScoringRequest = tuple[int, "Prompt | Document", Sequence[str]]


def most_probable(scores: Sequence[ChoiceScore]) -> ChoiceScore:
    """The choice with the highest score; the first one of equal ones."""
    return max(scores, key=lambda score: score.logprob)


def score_prompts(
    model: GeneratingModel,
    prompts: Sequence[Prompt | Document],
    choices: Sequence[Sequence[str]],
    options: ScoringOptions,
    batch_size: int,
) -> list[list[ChoiceScore]]:
    """The scores of each prompt's choices. Raises UserError for the first that cannot be scored."""
    if len(prompts) != len(choices):
        raise UserError(
            f"Expected a list of choices for each of {len(prompts)} prompts (got {len(choices)})."
        )
    requests = list(zip(range(len(prompts)), prompts, choices, strict=True))
    results = dict(score_all(model, requests, options, batch_size))
    scores: list[list[ChoiceScore]] = []
    for number in range(len(prompts)):
        result = results[number]
        if isinstance(result, str):
            raise UserError(result)
        scores.append(result)
    return scores


def score_all(
    model: GeneratingModel,
    requests: Iterable[ScoringRequest],
    options: ScoringOptions,
    batch_size: int,
) -> Iterator[tuple[int, list[ChoiceScore] | str]]:
    """Yields (number, scores in the order of the choices) for each (number, prompt, choices).

    For a question that cannot be scored (an unreadable image, equal choices, too many tokens for
    the context or the memory) the second value is the reason. Equal prompts with equal choices are
    read once.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, expected 1 or more.")
    remaining = iter(requests)
    while window := list(islice(remaining, batch_size * _BATCHES_PER_ROUND)):
        yield from _score_window(model, window, options, batch_size)


def _score_window(
    model: GeneratingModel,
    window: Sequence[ScoringRequest],
    options: ScoringOptions,
    batch_size: int,
) -> Iterator[tuple[int, list[ChoiceScore] | str]]:
    encoded: list[tuple[int, Sequence[str], list[Continuations]]] = []
    for number, prompt, choices in window:
        try:
            encoded.append((number, choices, _encode(model, prompt, choices, options)))
        except UserError as error:
            yield number, str(error)
    unique = list(dict.fromkeys(question for _, _, own in encoded for question in own))
    values = log_likelihoods(model.engine, unique, options.with_end, batch_size)
    found = dict(zip(unique, values, strict=True))
    for number, choices, own in encoded:
        results = [found[question] for question in own]
        reasons = [result for result in results if isinstance(result, str)]
        rows = [result for result in results if not isinstance(result, str)]
        yield number, reasons[0] if reasons else _to_scores(choices, own[0], rows, options)


def _to_scores(
    choices: Sequence[str],
    question: Continuations,
    rows: Sequence[Sequence[float]],
    options: ScoringOptions,
) -> list[ChoiceScore]:
    """`rows` are the log-likelihoods after the prompt and, if asked for, without its images."""
    logprobs = list(rows[0])
    if options.prior_correction:
        logprobs = [value - prior for value, prior in zip(logprobs, rows[1], strict=True)]
    if options.per_token:
        lengths = [len(ids) + options.with_end for ids in question.choices]
        logprobs = [value / length for value, length in zip(logprobs, lengths, strict=True)]
    highest = max(logprobs)
    weights = [math.exp(value - highest) for value in logprobs]
    total = sum(weights)
    return [
        ChoiceScore(text, logprob, weight / total)
        for text, logprob, weight in zip(choices, logprobs, weights, strict=True)
    ]


# --- token ids --------------------------------------------------------------------------------


def _encode(
    model: GeneratingModel,
    prompt: Prompt | Document,
    choices: Sequence[str],
    options: ScoringOptions,
) -> list[Continuations]:
    """The question and, for a prior correction, the same without its images.

    Raises UserError for choices that cannot be scored.
    """
    encoded = encode_choices(model.text_tokenizer, choices)
    prompts = [prompt]
    if options.prior_correction:
        prompts.append(remove_images(prompt))
    questions = [Continuations(tuple(model.encode_prompt(own)), encoded) for own in prompts]
    for question in questions:
        check_length(question, choices, options, model.engine.max_seq_len)
    return questions


def encode_choices(tokenizer: TextTokenizer, choices: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of each choice. Raises UserError if one is empty, or if two have the same ids."""
    if isinstance(choices, str) or not choices or not all(isinstance(c, str) for c in choices):
        raise UserError(f"choices must be a list of texts (got {choices!r}).")
    numbers: dict[tuple[int, ...], int] = {}
    for number, choice in enumerate(choices):
        ids = tuple(tokenizer.encode(choice))
        if not choice.strip() or not ids:
            raise UserError(
                f"Choice {number + 1} of {len(choices)} is empty (got {choice!r}). Remove it."
            )
        if (other := numbers.setdefault(ids, number)) != number:
            raise UserError(
                f"Choices {other + 1} and {number + 1} have the same tokens (got "
                f"{_shorten(choices[other])} and {_shorten(choice)}). Change or remove one."
            )
    return tuple(numbers)


def check_length(
    question: Continuations, choices: Sequence[str], options: ScoringOptions, max_seq_len: int
) -> None:
    """Raises UserError if a choice does not fit into the context behind the prompt."""
    lengths = [len(ids) + options.with_end for ids in question.choices]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    prompt, length = len(question.prompt), lengths[longest]
    if prompt + length > max_seq_len:
        raise UserError(
            f"Choice {longest + 1} does not fit into the context: {_shorten(choices[longest])} has "
            f"{length} tokens, and its prompt {prompt} (got {prompt + length} tokens, expected at "
            f"most {max_seq_len}). Shorten the choice or the prompt."
        )


def _shorten(choice: str) -> str:
    return repr(choice if len(choice) <= _SHOWN else f"{choice[:_SHOWN]}...")


def remove_images(prompt: Prompt | Document) -> Prompt | Document:
    """The image-blind prompt: its texts alone. Raises UserError for a prompt without an image."""
    if isinstance(prompt, Document):
        count = len(prompt.images)
        turns = (
            replace(turn, parts=tuple(part for part in turn.parts if isinstance(part, str)))
            for turn in prompt.turns
        )
        blind: Prompt | Document = Document(tuple(turns))
    else:
        parts = [prompt] if isinstance(prompt, str) else prompt
        blind = [part for part in parts if isinstance(part, str)]
        count = len(parts) - len(blind)
    if not count:
        raise UserError(
            "The prompt has no image, so that a prior correction would make all scores 0. Score "
            "it without prior correction."
        )
    return blind
