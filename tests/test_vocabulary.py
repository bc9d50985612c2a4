from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN, golden

from medley.data.vocabulary import TextTokenizer, Vocabulary, VocabularyError, image_token_name

FILE = GOLDEN / "tiny_chameleon_tokenizer" / "text_tokenizer.json"


@pytest.fixture(scope="module")
def parsed() -> Any:
    return json.loads(FILE.read_text())


def test_ids_equal_recorded_layout() -> None:
    vocabulary = Vocabulary.from_file(FILE)
    info = golden("medmax_sequence_and_vocab.json")["vocab_info"]
    assert (vocabulary.bos, vocabulary.eos, vocabulary.pad) == (
        info["bos_id"],
        info["eos_id"],
        info["pad_id"],
    )
    assert vocabulary.begin_image == info["boi_id"]
    assert vocabulary.end_image == info["eoi_id"]
    assert vocabulary.end_turn == info["eot_id"]
    assert vocabulary.image_placeholder == 8711
    assert vocabulary.image_codes == range(info["image_first"], info["image_last"] + 1)
    assert len(vocabulary.text_tokens) == info["n_text"]
    assert vocabulary.size == info["n_all"]


def test_image_code_mapping_equals_recorded() -> None:
    vocabulary = Vocabulary.from_file(FILE)
    recorded = golden("medmax_sequence_and_vocab.json")["codebook_mapping"]
    for code, token in recorded["img2bpe"].items():
        assert vocabulary.image_code_to_token(int(code)) == token
    for token, code in recorded["bpe2img"].items():
        assert vocabulary.token_to_image_code(int(token)) == code


@pytest.mark.parametrize(
    ("code", "name"), [(0, "IMGIMGAZ"), (10, "IMGIMGBAZ"), (8191, "IMGIMGIBJBZ")]
)
def test_image_token_names(code: int, name: str) -> None:
    assert image_token_name(code) == name


@pytest.mark.parametrize("name", ["<s>", "<pad>", "</s>", "<unk>", "<eoss>", "<racm3:break>"])
def test_missing_special_token_is_named(parsed: Any, name: str) -> None:
    incomplete = without(parsed, name)
    with pytest.raises(VocabularyError, match=name):
        Vocabulary.from_json(incomplete, "file.json")


def test_missing_image_token_is_named(parsed: Any) -> None:
    with pytest.raises(VocabularyError, match=image_token_name(4711)):
        Vocabulary.from_json(without(parsed, image_token_name(4711)), "file.json")


def without(parsed: Any, name: str) -> Any:
    changed = copy.deepcopy(parsed)
    del changed["model"]["vocab"][name]
    changed["added_tokens"] = [t for t in changed["added_tokens"] if t["content"] != name]
    return changed


def test_image_codes_out_of_range_raise() -> None:
    vocabulary = Vocabulary.from_file(FILE)
    for code in (-1, 8192):
        with pytest.raises(ValueError, match="0 to 8191"):
            vocabulary.image_code_to_token(code)
    with pytest.raises(ValueError, match="Token 8196 is not an image token"):
        vocabulary.token_to_image_code(8196)


@pytest.mark.parametrize("content", [None, "not json", "{}"])
def test_invalid_tokenizer_file_raises(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "text_tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(VocabularyError, match=r"text_tokenizer\.json"):
        TextTokenizer.from_file(path)


def test_typed_special_tokens_are_text(tokenizer: TextTokenizer) -> None:
    for typed in ("<image>", "</s>", "IMGIMGAZ", "<reserved08706>"):
        assert set(tokenizer.encode(typed)) <= tokenizer.vocabulary.text_tokens
        assert tokenizer.decode(tokenizer.encode(typed)) == typed


def test_decoded_text_equals_recorded(tokenizer: TextTokenizer) -> None:
    for case in golden("medmax_sequence_and_vocab.json")["decode_text"]:
        for ids, text in zip(case["input"], case["expected"], strict=True):
            end = ids.index(tokenizer.vocabulary.eos) if tokenizer.vocabulary.eos in ids else None
            assert tokenizer.decode(ids[:end]) == text
