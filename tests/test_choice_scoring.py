"""Choice scoring: equal to plain forward passes, whatever the batch, the lengths and the memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image

import medley
from medley.checkpoints.checkpoint import open_checkpoint
from medley.data.document import Document, ImagePart, Turn
from medley.errors import UserError
from medley.generation import Engine, likelihood
from medley.generation.likelihood import Continuations, log_likelihoods
from medley.inference.choice_scoring import ChoiceScore, ScoringOptions, score_all
from medley.inference.model import Model

IMAGE = Image.new("RGB", (64, 64), "navy")
PROMPTS: list[Any] = [
    ["Is there a cyst?"],
    [IMAGE, "What does this scan show?"],
    [IMAGE, IMAGE, "Which one has a mass?"],
    Document((
        Turn("user", (ImagePart(image=IMAGE), "Is it red?")), Turn("assistant", ("no",)),
        Turn("user", ("Is there a mass in the lung?",)),
    )),
]  # fmt: skip
CHOICES = ["yes", "no", "no, there is no mass in the left lung", "A"]


def plain(
    decoder: Any, vocabulary: Any, prompt: Sequence[int], choice: Sequence[int], with_end: bool
) -> float:
    """The definition: one forward pass over the prompt and one choice."""
    ids = torch.tensor([[*prompt, *choice]])
    with torch.inference_mode():
        logprobs = decoder(ids).logits[0].float().log_softmax(-1)
    own = logprobs[len(prompt) - 1 : -1]
    total = sum(own[i, token].item() for i, token in enumerate(choice))
    if with_end:
        last = logprobs[-1]
        total += torch.logaddexp(last[vocabulary.eos], last[vocabulary.end_turn]).item()
    return float(total)


def close(values: Sequence[float]) -> Any:
    """Equal to 1e-5, which is about what float32 allows."""
    return pytest.approx(values, rel=1e-5, abs=1e-5)


def logprobs(scores: Sequence[ChoiceScore]) -> list[float]:
    return [score.logprob for score in scores]


@pytest.fixture(scope="module")
def expected(tiny_model: Model) -> dict[bool, list[list[float]]]:
    """Plain log-likelihoods of each choice after each prompt, with and without their end."""
    model = tiny_model
    return {
        with_end: [
            [
                plain(model.decoder, model.vocabulary, model.encode_prompt(prompt),
                      model.text_tokenizer.encode(choice), with_end)
                for choice in CHOICES
            ]
            for prompt in PROMPTS
        ]
        for with_end in (True, False)
    }  # fmt: skip


# --- exactness --------------------------------------------------------------------------------


@pytest.mark.parametrize("with_end", [True, False])
def test_scores_equal_plain_forward_passes(
    tiny_model: Model, expected: dict[bool, list[list[float]]], with_end: bool
) -> None:
    """Choices of one token and of many; text alone, images, and an earlier turn."""
    scores = tiny_model.score_batch(PROMPTS, CHOICES, with_end=with_end)
    for own, values in zip(scores, expected[with_end], strict=True):
        assert [score.text for score in own] == CHOICES
        assert logprobs(own) == close(values)
        weights = [math.exp(value - max(values)) for value in values]
        softmax = [weight / sum(weights) for weight in weights]
        assert [score.probability for score in own] == pytest.approx(softmax, abs=1e-4)
    one = tiny_model.score(PROMPTS[1], CHOICES, with_end=with_end)
    assert logprobs(one) == close(expected[with_end][1])


@pytest.mark.parametrize("adapted", [False, True])
def test_every_layout_and_an_unmerged_adapter_are_exact(layout: Path, adapted: bool) -> None:
    checkpoint = open_checkpoint(layout / "input")
    decoder: Any = checkpoint.decoder(torch.float32)
    if adapted:
        modules = ["q_proj", "down_proj", "lm_head"]
        decoder = peft.get_peft_model(
            decoder, peft.LoraConfig(target_modules=modules, init_lora_weights=False)
        ).eval()
    base = decoder.get_base_model() if adapted else decoder
    engine = Engine(base, checkpoint.text_tokenizer().vocabulary, 1024, fuse=not adapted)
    random = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(8720, 8790, (count,), generator=random).tolist())

    questions = [
        Continuations(ids(prompt), tuple(ids(length) for length in lengths))
        for prompt, lengths in ((30, (1, 2)), (7, (5,)), (1, (3, 1, 8, 1)), (30, (1, 1, 1)))
    ]
    for with_end in (True, False):
        values = log_likelihoods(engine, questions, with_end, 3)
        for question, own in zip(questions, values, strict=True):
            assert own == close(
                [plain(decoder, engine.vocabulary, question.prompt, choice, with_end)
                 for choice in question.choices],
            )  # fmt: skip


@pytest.mark.parametrize("limit", [1, 5, 12])
def test_choices_that_do_not_fit_into_one_pass(
    tiny_model: Model, expected: dict[bool, list[list[float]]], limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also if some questions of a batch have more choices than others."""
    monkeypatch.setattr(likelihood, "MAX_CHOICE_TOKENS", limit)
    own = [CHOICES, CHOICES[:1], CHOICES[2:3], CHOICES]
    scores = tiny_model.score_batch(PROMPTS, own)
    assert logprobs(scores[0]) == close(expected[True][0])
    assert logprobs(scores[1]) == close(expected[True][1][:1])
    assert logprobs(scores[2]) == close(expected[True][2][2:3])
    assert logprobs(scores[3]) == close(expected[True][3])


def test_scores_do_not_depend_on_the_batch(
    tiny_model: Model, expected: dict[bool, list[list[float]]]
) -> None:
    """Up to rounding; not at all with `deterministic`."""
    alone = [tiny_model.score(prompt, CHOICES) for prompt in PROMPTS]
    assert tiny_model.score_batch(PROMPTS, CHOICES, deterministic=True) == alone
    assert tiny_model.score_batch(PROMPTS[::-1], CHOICES, deterministic=True) == alone[::-1]
    for batch_size in (2, 3):
        many = tiny_model.score_batch(PROMPTS * 2, CHOICES, batch_size)
        for own, values in zip(many, expected[True] * 2, strict=True):
            assert logprobs(own) == close(values)


def test_a_choice_does_not_change_the_others(tiny_model: Model) -> None:
    few = tiny_model.score(PROMPTS[1], CHOICES[:2])
    many = tiny_model.score(PROMPTS[1], [*CHOICES[::-1], "an abdomen"])
    found = {score.text: score.logprob for score in many}
    assert [found[score.text] for score in few] == close(logprobs(few))


# --- normalization ----------------------------------------------------------------------------


@pytest.mark.parametrize("with_end", [True, False])
def test_per_token_divides_by_the_tokens_that_are_scored(
    tiny_model: Model, expected: dict[bool, list[list[float]]], with_end: bool
) -> None:
    scores = tiny_model.score(PROMPTS[1], CHOICES, per_token=True, with_end=with_end)
    lengths = [len(tiny_model.text_tokenizer.encode(choice)) + with_end for choice in CHOICES]
    values = [value / n for value, n in zip(expected[with_end][1], lengths, strict=True)]
    assert logprobs(scores) == close(values)
    assert sum(score.probability for score in scores) == pytest.approx(1)


def test_a_prior_correction_subtracts_the_image_blind_score(
    tiny_model: Model, expected: dict[bool, list[list[float]]]
) -> None:
    blind: list[Any] = [
        ["What does this scan show?"],
        ["Which one has a mass?"],
        Document((
            Turn("user", ("Is it red?",)), Turn("assistant", ("no",)),
            Turn("user", ("Is there a mass in the lung?",)),
        )),
    ]  # fmt: skip
    priors = tiny_model.score_batch(blind, CHOICES)
    scores = tiny_model.score_batch(PROMPTS[1:], CHOICES, prior_correction=True)
    for own, prior, values in zip(scores, priors, expected[True][1:], strict=True):
        corrected = [v - p for v, p in zip(values, logprobs(prior), strict=True)]
        # Two large values may differ by little: the rounding of each counts.
        assert logprobs(own) == pytest.approx(corrected, rel=1e-5, abs=1e-4)
    with pytest.raises(UserError, match="The prompt has no image"):
        tiny_model.score(PROMPTS[0], CHOICES, prior_correction=True)


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["yes", "no", "yes"], r"Choices 1 and 3 have the same tokens \(got 'yes' and 'yes'\)"),
        (["yes", ""], r"Choice 2 of 2 is empty \(got ''\)"),
        (["  ", "no"], r"Choice 1 of 2 is empty"),
        ([], "choices must be a list of texts"),
        ("yes,no", "choices must be a list of texts"),
        (["yes", 1], "choices must be a list of texts"),
        (["yes", "no " * 5000], r"Choice 2 does not fit into the context: 'no no .*\.\.\.' has \d+ "
                                r"tokens, and its prompt \d+ \(got \d+ tokens, expected at most"),
    ],
)  # fmt: skip
def test_choices_that_cannot_be_scored(tiny_model: Model, choices: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        tiny_model.score(["Is there a cyst?"], choices)
    assert "\n" not in str(error.value)


def test_different_texts_with_the_same_tokens(tiny_model: Model, monkeypatch: Any) -> None:
    """Such as two characters that a vocabulary does not contain."""
    monkeypatch.setattr(
        type(tiny_model.text_tokenizer), "encode", lambda _, text: [5] if text else []
    )
    with pytest.raises(UserError, match="'一' and '二'"):
        tiny_model.score(["?"], ["一", "二"])


def test_a_choice_may_fill_the_context(tiny_model: Model) -> None:
    prompt = len(tiny_model.encode_prompt(["?"]))
    one = len(tiny_model.text_tokenizer.encode("no" * 2)) - len(
        tiny_model.text_tokenizer.encode("no")
    )
    room = tiny_model.engine.max_seq_len - prompt - 1
    fitting = "no" * (room // one)
    while len(tiny_model.text_tokenizer.encode(fitting)) < room:
        fitting += "."
    assert len(tiny_model.text_tokenizer.encode(fitting)) == room
    scores = tiny_model.score(["?"], [fitting, "no"])
    assert scores[1].probability > scores[0].probability
    with pytest.raises(UserError, match="does not fit into the context"):
        tiny_model.score(["?"], [fitting + ".", "no"])


def test_a_question_that_fails_does_not_stop_the_others(tiny_model: Model) -> None:
    prompts: list[Any] = [["?"], [ImagePart(path="missing.png"), "?"], ["?"], ["?"]]
    choices = [["yes", "no"], ["yes", "no"], ["yes", "yes"], ["a", "b"]]
    requests = zip(range(4), prompts, choices, strict=True)
    results = dict(score_all(tiny_model, requests, ScoringOptions(), 2))
    assert {number: type(result) for number, result in results.items()} == {
        0: list, 1: str, 2: str, 3: list
    }  # fmt: skip
    with pytest.raises(UserError, match="same tokens"):
        tiny_model.score_batch(prompts[2:], choices[2:])
    for size in (0, -1):
        with pytest.raises(UserError, match="batch_size is"):
            tiny_model.score_batch([["?"]], ["yes", "no"], batch_size=size)
    with pytest.raises(UserError, match="a list of choices for each of 2 prompts"):
        tiny_model.score_batch([["?"], ["?"]], [["yes", "no"]])
    assert tiny_model.score_batch([], ["yes", "no"]) == []


# --- memory -----------------------------------------------------------------------------------


@pytest.fixture
def own_model() -> Model:
    return medley.load("tiny", device="cpu")


def counting(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[int]:
    """Passes over more than `limit` prompts run out of memory; the sizes of the others."""
    run: Callable[..., Any] = likelihood._run
    sizes: list[int] = []

    def limited(engine: Any, ids: Any, *rest: Any) -> Any:
        if len(ids) > limit:
            raise torch.OutOfMemoryError
        sizes.append(len(ids))
        return run(engine, ids, *rest)

    monkeypatch.setattr(likelihood, "_run", limited)
    return sizes


def test_a_batch_that_does_not_fit_is_cut(
    tiny_model: Model, expected: dict[bool, list[list[float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counting(monkeypatch, 2)
    for own, values in zip(tiny_model.score_batch(PROMPTS, CHOICES), expected[True], strict=True):
        assert logprobs(own) == close(values)
    counting(monkeypatch, 0)
    with pytest.raises(UserError, match=r"does not fit into the memory of cpu.*need more than is"):
        tiny_model.score(PROMPTS[0], CHOICES)


def test_batches_stay_within_the_caches_memory(
    own_model: Model, expected: dict[bool, list[list[float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [own_model.encode_prompt(prompt) for prompt in PROMPTS]
    longest = max(map(len, ids)) + sum(
        len(own_model.text_tokenizer.encode(choice)) for choice in CHOICES
    )
    own_model.engine.set_cache_bytes(2 * longest * own_model.engine.budget.bytes_per_token)
    sizes = counting(monkeypatch, 100)
    scores = own_model.score_batch(PROMPTS, CHOICES)
    assert max(sizes) < len(PROMPTS)
    for own, values in zip(scores, expected[True], strict=True):
        assert logprobs(own) == close(values)
    own_model.engine.set_cache_bytes(10 * own_model.engine.budget.bytes_per_token)
    with pytest.raises(
        UserError, match=r"keys and values of \d+ tokens need .* GB, .* GB are free"
    ):
        own_model.score(PROMPTS[1], CHOICES)


def test_equal_questions_are_read_once(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = counting(monkeypatch, 100)
    images: list[Any] = [[IMAGE, "Is it?"], [Image.new("RGB", (64, 64), "red"), "Is it?"]]
    tiny_model.score_batch(images, ["yes", "no"], prior_correction=True)
    assert sizes == [3, 3]  # prompts and choices of two questions and of their common prior


def test_damaged_weights_are_an_error(own_model: Model) -> None:
    with torch.no_grad():
        own_model.engine.decoder.model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        own_model.score(["?"], ["yes", "no"])
