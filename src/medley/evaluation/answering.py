"""Answers of a model to questions: a response, two as LLaVA's --answer-prompter, or a choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from medley.data.document import Document, Turn
from medley.errors import UserError
from medley.evaluation.question_choices import CHOICE
from medley.generation import GenerationOptions
from medley.inference.batch import generate_all
from medley.inference.choice_scoring import ChoiceScore, ScoringOptions, score_all
from medley.inference.model import Model
from medley.inference.response import Response

PROMPTER = "The answer is"
PROMPTER_TOKENS = 64  # maximum length of the second response
_BATCHES_PER_ROUND = 4  # of first responses, before their second ones


def answer_once(
    model: Model,
    prompts: Sequence[Document],
    pending: Sequence[int],
    options: GenerationOptions,
    batch_size: int,
) -> Iterator[tuple[int, Response | str]]:
    """Yields (number, response or error message) for the prompts whose numbers are `pending`."""
    requests = ((number, prompts[number], options) for number in pending)
    return generate_all(model, requests, batch_size=batch_size)


def answer_twice(
    model: Model,
    prompts: Sequence[Document],
    pending: Sequence[int],
    options: GenerationOptions,
    batch_size: int,
) -> Iterator[tuple[int, Response | str]]:
    """`answer_once` with a second, short response to "The answer is", appended to the first one.

    The first response leaves room in the context for the second turn.
    """
    # The second turn's tokens, its response, and the end-of-turn tokens of both responses.
    reserved = len(model.encode_prompt(PROMPTER)) + PROMPTER_TOKENS + 2
    question = Turn("user", (PROMPTER,))
    short = replace(options, max_new_tokens=PROMPTER_TOKENS)
    size = _BATCHES_PER_ROUND * batch_size
    for start in range(0, len(pending), size):
        first: dict[int, Response | str] = {}
        requests: list[tuple[int, Document, GenerationOptions]] = []
        for number in pending[start : start + size]:
            try:
                prompt_length = len(model.encode_prompt(prompts[number]))
            except UserError as error:
                first[number] = str(error)
                continue
            room = model.engine.max_seq_len - prompt_length - reserved
            limit = min(options.max_new_tokens, max(room, 1))
            requests.append((number, prompts[number], replace(options, max_new_tokens=limit)))
        first |= dict(generate_all(model, requests, batch_size=batch_size))
        followed_up = [
            (number, _append_turns(prompts[number], response.text, question), short)
            for number, response in sorted(first.items())
            if isinstance(response, Response)
        ]
        for number, second in generate_all(model, followed_up, batch_size=batch_size):
            response = first.pop(number)
            if isinstance(second, Response) and isinstance(response, Response):
                text = f"{response.text}\n {PROMPTER} {second.text}"
                yield number, Response([text], second.finish_reason, second.note, second.ids)
            else:
                yield number, second
        yield from first.items()  # prompts that could not be processed


def _append_turns(prompt: Document, response: str, question: Turn) -> Document:
    return Document((*prompt.turns, Turn("assistant", (response,)), question))


def score_choices(
    model: Model,
    prompts: Sequence[Document],
    pending: Sequence[int],
    choices: Sequence[Sequence[str] | UserError],
    template: str,
    options: ScoringOptions,
    batch_size: int,
) -> Iterator[tuple[int, list[ChoiceScore] | str]]:
    """Yields (number, scores of the choices or error message) for the numbers in `pending`.

    `choices` are those of each prompt, or why it has none. The text that is scored is `template`
    with the choice in place of {choice}.
    """
    scored = {n: own for n in pending if not isinstance(own := choices[n], UserError)}
    yield from ((number, str(choices[number])) for number in pending if number not in scored)
    requests = (
        (number, prompts[number], [template.replace(CHOICE, choice) for choice in own])
        for number, own in scored.items()
    )
    for number, result in score_all(model, requests, options, batch_size):
        if isinstance(result, str):
            yield number, result
        else:
            pairs = zip(scored[number], result, strict=True)
            yield number, [replace(score, text=choice) for choice, score in pairs]
