from __future__ import annotations

from typing import Any

import pytest
from conftest import golden
from hypothesis import given
from hypothesis import strategies as st

from medley.data.document import (
    Document,
    DocumentError,
    ImagePart,
    Turn,
    assistant_spans,
    ids_to_parts,
)
from medley.data.medmax_compat import encode_medmax, medmax_collate
from medley.data.vocabulary import TextTokenizer

CASES = golden("medmax_tokenization.json")["cases"]
LABELS = golden("medmax_labels.json")["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_ids_equal_recorded(
    case: Any, tokenizer: TextTokenizer, exceptions: dict[str, dict[str, str]]
) -> None:
    expected = case["expected"]["tokens"]
    assert encode_medmax(case["input"], tokenizer) == expected
    if case["id"] not in exceptions["medmax_tokenization"]:
        assert Document.from_json(case["input"]).to_ids(tokenizer) == expected
        return
    try:
        ours = Document.from_json(case["input"]).to_ids(tokenizer)
    except ValueError:
        return  # rejected, as golden_exceptions.json states
    assert ours != expected


@pytest.mark.parametrize("case", LABELS, ids=lambda case: case["id"])
def test_medmax_batches_equal_recorded(case: Any, tokenizer: TextTokenizer) -> None:
    sequences, expected = case["input"]["tokens"], case["expected"]
    if "error" in expected:
        with pytest.raises(IndexError):
            medmax_collate(sequences, tokenizer.vocabulary)
        return
    batch = medmax_collate(sequences, tokenizer.vocabulary)
    for name, dtype in expected["dtypes"].items():
        assert batch[name].tolist() == expected[name]
        assert str(batch[name].dtype) == dtype


def test_parts_of_ids_equal_recorded(
    tokenizer: TextTokenizer, exceptions: dict[str, dict[str, str]]
) -> None:
    codes = tokenizer.vocabulary.image_codes
    for case in golden("medmax_sequence_and_vocab.json")["split_token_sequence"]:
        if case["id"] in exceptions["medmax_sequence_and_vocab"]:
            continue
        if case["id"] == "text_only":
            continue  # its "text" ids 5, 6, 7 are image tokens outside of an image
        parts = ids_to_parts(case["input"], tokenizer)
        images = [ids[0] for kind, ids in case["expected"] if kind == "image_seg"]
        parsed = [list(p.codes or ()) for p in parts if isinstance(p, ImagePart)]
        assert parsed == [[token - codes.start for token in ids] for ids in images]


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
images = st.lists(st.integers(0, 8191), min_size=1, max_size=6).map(
    lambda codes: ImagePart(codes=tuple(codes))
)


@st.composite
def some_parts(draw: Any) -> tuple[Any, ...]:
    """Parts without adjacent texts, because ids do not contain the border between two texts."""
    parts: list[Any] = draw(st.lists(st.one_of(texts, images), min_size=1, max_size=5))
    return tuple(
        p
        for i, p in enumerate(parts)
        if not (i and isinstance(p, str) and isinstance(parts[i - 1], str))
    )


documents = st.lists(some_parts(), min_size=2, max_size=6).map(
    lambda turns: Document(
        tuple(Turn(("user", "assistant")[i % 2], parts) for i, parts in enumerate(turns))
    )
)


@pytest.fixture(scope="module")
def tiny_tokenizer() -> TextTokenizer:
    from medley.checkpoints.checkpoint import open_checkpoint

    return open_checkpoint("tiny").text_tokenizer()


@given(document=documents)
def test_any_document_round_trips_through_ids(
    document: Document, tiny_tokenizer: TextTokenizer
) -> None:
    assert Document.from_ids(document.to_ids(tiny_tokenizer), tiny_tokenizer) == document


def test_assistant_spans_include_the_token_that_ends_each_turn(tokenizer: TextTokenizer) -> None:
    turns = [Turn("user", ("The",)), Turn("assistant", ("left",))] * 2
    ids = Document(tuple(turns)).to_ids(tokenizer)
    trained = [ids[start:end] for start, end in assistant_spans(ids, tokenizer.vocabulary)]
    answer = tokenizer.encode("left")
    assert trained == [
        [*answer, tokenizer.vocabulary.end_turn],
        [*answer, tokenizer.vocabulary.eos],
    ]


def test_assistant_span_of_a_single_turn_is_the_complete_document(tokenizer: TextTokenizer) -> None:
    ids = Document((Turn("assistant", ("left",)),)).to_ids(tokenizer)
    assert assistant_spans(ids, tokenizer.vocabulary) == [(1, len(ids))]


def test_messages_and_text_give_the_same_ids(tokenizer: TextTokenizer) -> None:
    codes = [1, 2, 3]
    text = {"text": "<image>What?<reserved08706>The left", "image_tokens": codes}
    messages = {
        "messages": [
            {"role": "user", "content": "<image>What?"},
            {"role": "assistant", "content": "The left"},
        ],
        "image_tokens": codes,
    }
    first, second = (Document.from_json(row).to_ids(tokenizer) for row in (text, messages))
    assert first == second


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "neither 'text' nor 'messages'"),
        ({"text": 3}, "expected a string"),
        ({"text": "<image>"}, "placeholders .1. differs from the number of images .0."),
        ({"text": "<image>", "image_tokens": [1, "x"]}, "not an integer"),
        ({"text": "<image>", "image_path": ["a", "b"], "image_tokens": [[1]]}, "2 image paths"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "Unsupported role 'tool'"),
        ({"messages": [{"role": "user"}]}, "lacks 'role' or 'content'"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            "must alternate",
        ),
    ],
)
def test_invalid_documents_raise_with_the_reason(row: Any, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        Document.from_json(row)


def test_deprecated_names_warn(tokenizer: TextTokenizer) -> None:
    document = Document((Turn("assistant", ("a", ImagePart(codes=(1,)))),))
    with pytest.warns(DeprecationWarning, match="use Document.images"):
        assert document.pictures == document.images  # alias
    with pytest.warns(DeprecationWarning, match="use Document.map_images"):
        assert document.map_pictures(lambda image: image) == document  # alias
    with pytest.warns(DeprecationWarning, match="use Vocabulary.image_placeholder"):
        assert tokenizer.vocabulary.image == tokenizer.vocabulary.image_placeholder
