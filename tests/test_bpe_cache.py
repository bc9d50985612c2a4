from __future__ import annotations

import json

import hostile
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from medley.data.bpe_cache import CachedBPE
from medley.tiny.embedded import tiny_folder

FILES = [
    GOLDEN / "tiny_chameleon_tokenizer" / "text_tokenizer_modified.json",
    tiny_folder() / "tokenizer" / "text_tokenizer.json",
]


def make(index: int, **changes: object) -> tuple[CachedBPE, Tokenizer]:
    parsed = {**json.loads(FILES[index].read_text()), "added_tokens": [], **changes}
    tokenizer = Tokenizer.from_str(json.dumps(parsed))
    return CachedBPE(tokenizer, parsed), tokenizer


ENCODERS = [make(0), make(1)]
# Letters, digits, quotes and all kinds of whitespace, whose neighbors determine the splits.
SPLIT_CASES = st.text(
    st.sampled_from("aB's'd7 0\t\n\r\v\f\x1c\x1f\x85.,-_<>|é中µ°\u00a0\u2028٣😀"), max_size=40
)


@settings(max_examples=hostile.scaled(1500))
@given(text=st.one_of(SPLIT_CASES, st.text(max_size=60)), which=st.sampled_from([0, 1]))
def test_ids_equal_those_of_tokenizers(text: str, which: int) -> None:
    encoder, tokenizer = ENCODERS[which]
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    assert encoder.encode(text) == expected
    assert encoder.encode(text) == expected  # from the cache


@pytest.mark.parametrize(
    "text",
    [
        "It's 37.5 °C,  we'll  see\n\n 12 x",
        "α-synuclein in “quotes” and plain words",
        "",
        " ",
        "7 7",
    ],
)
def test_ids_of_medical_texts_equal_those_of_tokenizers(text: str) -> None:
    for encoder, tokenizer in ENCODERS:
        assert encoder.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_other_pre_tokenizer_is_not_accelerated() -> None:
    rule = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    encoder, tokenizer = make(0, pre_tokenizer=rule)
    text = "a 12b  c's"
    assert encoder.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids
    assert encoder.encode(text) != ENCODERS[0][0].encode(text)
