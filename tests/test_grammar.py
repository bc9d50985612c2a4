"""The decoding grammar: predicates without side effects, and the states of one sequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from medley.data.vocabulary import TextTokenizer, Vocabulary
from medley.generation import GenerationOptions
from medley.generation.grammar import DecodingGrammar, TokenMasks

CODES = 4
IMAGE = CODES + 2  # tokens of one image


@pytest.fixture(scope="module")
def vocabulary(tokenizer: TextTokenizer) -> Vocabulary:
    return tokenizer.vocabulary


@pytest.fixture(scope="module")
def masks(vocabulary: Vocabulary) -> TokenMasks:
    return TokenMasks(vocabulary, vocabulary.size, torch.device("cpu"))


def start(vocabulary: Vocabulary, tokens_left: int, **options: Any) -> DecodingGrammar:
    grammar = DecodingGrammar(vocabulary, GenerationOptions(**options), CODES, tokens_left)
    grammar.start()
    return grammar


def add_image(grammar: DecodingGrammar) -> None:
    vocabulary = grammar.vocabulary
    for token in (vocabulary.begin_image, *vocabulary.image_codes[:CODES], vocabulary.end_image):
        grammar.advance(token)


@pytest.mark.parametrize("tokens_left", [2, IMAGE, 3 * IMAGE])
@pytest.mark.parametrize(
    "options", [{}, {"mode": "text"}, {"mode": "image"}, {"min_images": 1, "max_images": 2}]
)
def test_predicates_change_nothing(
    vocabulary: Vocabulary, masks: TokenMasks, options: dict[str, Any], tokens_left: int
) -> None:
    grammar = start(vocabulary, tokens_left, **options)
    before = copy.copy(grammar.__dict__)
    grammar.forced_token()
    grammar.allowed_tokens(masks)
    grammar.image_skipped_reason()
    assert (grammar.image_allowed, grammar.in_image) == (grammar.image_allowed, False)
    assert grammar.__dict__ == before


def test_blocked_image_is_recorded_when_tokens_run_short(vocabulary: Vocabulary) -> None:
    text = min(vocabulary.text_tokens)
    grammar = start(vocabulary, IMAGE)
    assert grammar.image_allowed
    assert not grammar.image_blocked
    grammar.advance(text)
    assert not grammar.image_allowed
    assert grammar.image_blocked
    grammar.advance(vocabulary.eos)
    assert "no image because a complete image takes 6 tokens" in str(grammar.image_skipped_reason())


def test_text_mode_records_no_blocked_image(vocabulary: Vocabulary) -> None:
    grammar = start(vocabulary, 2, mode="text")
    assert not grammar.image_blocked
    assert grammar.image_skipped_reason() is None


def test_image_mode_without_room_ends_at_start(vocabulary: Vocabulary) -> None:
    grammar = start(vocabulary, IMAGE - 1, mode="image")
    assert grammar.finish_reason == "length"
    assert grammar.image_skipped_reason() is not None


def test_image_mode_stops_after_its_last_image(vocabulary: Vocabulary) -> None:
    grammar = start(vocabulary, 9 * IMAGE, mode="image", min_images=2)
    for count in (1, 2):
        assert grammar.finish_reason is None
        assert grammar.forced_token() == vocabulary.begin_image
        add_image(grammar)
        assert grammar.images == count
    assert grammar.finish_reason == "stop"


def test_image_mode_without_room_for_the_second_image_ends_with_length(
    vocabulary: Vocabulary,
) -> None:
    grammar = start(vocabulary, 2 * IMAGE - 1, mode="image", min_images=2)
    add_image(grammar)
    assert grammar.finish_reason == "length"
    assert str(grammar.image_skipped_reason()).startswith("1 of 2 images")


def test_required_images_are_forced_before_the_room_is_used_up(
    vocabulary: Vocabulary, masks: TokenMasks
) -> None:
    grammar = start(vocabulary, 2 * IMAGE + 3, min_images=2)
    allowed = grammar.allowed_tokens(masks)
    assert grammar.forced_token() is None
    assert not allowed[[vocabulary.eos, vocabulary.end_turn]].any()
    grammar.advance(min(vocabulary.text_tokens))
    grammar.advance(min(vocabulary.text_tokens))
    assert grammar.forced_token() == vocabulary.begin_image


def test_image_state_allows_image_tokens_only(vocabulary: Vocabulary) -> None:
    masks = TokenMasks(vocabulary, vocabulary.size, torch.device("cpu"), codebook_size=3)
    grammar = start(vocabulary, 9 * IMAGE)
    grammar.advance(vocabulary.begin_image)
    allowed = grammar.allowed_tokens(masks).nonzero().flatten().tolist()
    assert allowed == list(vocabulary.image_codes[:3])
    for token in vocabulary.image_codes[:CODES]:
        assert grammar.forced_token() is None
        grammar.advance(token)
    assert grammar.forced_token() == vocabulary.end_image
