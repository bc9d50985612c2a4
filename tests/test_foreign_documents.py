"""Layouts of others, and fields that must not be lost, in documents."""

from __future__ import annotations

import base64
import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medley.data.document import Document, DocumentError, ImagePart, Turn, assistant_spans
from medley.data.document_json import EMPTY_ANSWER, read_document
from medley.data.document_tokenizer import DocumentTokenizer
from medley.data.file_tokenizer import TokenizationStats
from medley.data.packing import IGNORE_INDEX, TrainOn, build_labels, build_sequence
from medley.data.token_dataset import TokenDataset, write_token_jsonl, write_token_parquet
from medley.data.validation import check_document
from medley.data.vocabulary import TextTokenizer
from medley.datasets import documents
from medley.datasets.base import ConversionConfig
from medley.errors import UserError
from medley.images.preprocess import ImageError, open_image
from medley.inference.prompts import read_prompts
from medley.trainer.data import PackedDataset, PackingConfig
from medley.utils.jsonl import json_lines, line_ranges

TOKENIZER_FILE = Path("src/medley/tiny/tokenizer/text_tokenizer.json")


def chat(question: Any, answer: Any = "A scan.", **fields: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question}, {"role": "assistant", "content": answer},
        ],
        **fields,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_of_lines() -> DocumentTokenizer:
    return DocumentTokenizer(TOKENIZER_FILE)


def data_url() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.mark.parametrize(
    ("row", "paths", "parts"),
    [
        (chat("<image>What?", images=["a.png"]), ["a.png"], 2),
        (chat("<image>What?", images="a.png"), ["a.png"], 2),
        (chat("<image>What?", image="a.png"), ["a.png"], 2),
        (chat("<image><image>?", images=[{"path": "a"}, {"path": "b", "bytes": None}]),
         ["a", "b"], 3),
        (chat([{"type": "image_url", "image_url": {"url": "a"}}, {"type": "text", "text": "?"}]),
         ["a"], 2),
        (chat([{"type": "image", "image": "file:///a.png"}, {"type": "text", "text": "?"}]),
         ["/a.png"], 2),
        (chat([{"type": "image"}, {"type": "text", "text": "?"}], images=["a.png"]), ["a.png"], 2),
        (chat([{"type": "text", "text": "<image>?"}], images=["a.png"]), ["a.png"], 2),
        (chat([{"type": "image", "image": "a"}, {"text": "?"}], images=["a"]), ["a"], 2),
        (chat([{"type": "text", "value": "What?"}]), [], 1),
        ({"text": "A cat.", "image": "cat.png"}, ["cat.png"], 2),
        ({"text": "<image>A cat.", "image": "cat.png"}, ["cat.png"], 2),
        ({"prompt": "This?<img>Or <img>", "image_urls": ["http://a/b", "c.png"]},
         ["http://a/b", "c.png"], 4),
        ({"messages": None, "text": "a<image>", "image_path": ["x.png"]}, ["x.png"], 2),
    ],
)  # fmt: skip
def test_images_of_common_layouts_are_read(row: Any, paths: Any, parts: int) -> None:
    document = Document.from_json(row)
    assert [part.path for part in document.images] == paths
    assert len(document.turns[0].parts) == parts


def test_the_image_of_anole_is_after_the_text_without_a_placeholder() -> None:
    assert Document.from_json({"text": "A cat.", "image": "c.png"}).turns[0].parts == (
        "A cat.", ImagePart(path="c.png"),
    )  # fmt: skip


@pytest.mark.parametrize("key", ["img_path", "image_paths", "pics", "photo", "file"])
@pytest.mark.parametrize("text", [True, False])
def test_unread_image_key_is_named(key: str, text: bool) -> None:
    row = {"text": "<image>a"} if text else chat("<image>What?")
    with pytest.raises(DocumentError, match=rf"placeholders \(1\) .* images \(0\).*'{key}'"):
        Document.from_json({**row, key: ["p0.png"]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat("<image>What?"), "placeholders .1. differs"),
        (chat([{"type": "text", "text": "<image>What?"}]), "placeholders .1. differs"),
        (chat("What?", images=["a.png"]), "placeholders .0. differs .* those of 'images'"),
        ({"text": "What?", "images": ["a.png"]}, "placeholders .0. differs"),
        (chat("<image>", images=["a"], image="b"), "in several keys"),
        (chat("<image>", images=[{"bytes": "aGk=", "path": "a"}]), "as bytes"),
        (chat("<image>", images=[3]), "not the path of an image"),
        (chat("?", videos=["a.mp4"]), "Video is unsupported .got 'videos'"),
        (chat("?", tools="[...]"), "Tool calls are unsupported .got 'tools'"),
        (chat("?", kto_tag=False), "'kto_tag' is false"),
        (chat([{"type": "video", "video": "a.mp4"}]), "Unsupported part of type 'video'"),
        (chat([{"type": "input_audio"}]), "Unsupported part of type 'input_audio'"),
        (chat([{"type": "text", "txt": "x"}]), "has no 'text'"),
        ({"messages": [{"role": "user", "content": "?", "images": ["a"]}]}, "inside a message"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "Tool calls"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]},
         "A system message belongs to the user's"),
        (chat("?", None), "got null"),
        ({"text": None}, "'text' is null"),
        ({"prompt": "?", "completion": "!"}, "'completion' beside 'prompt'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(row: Any, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        Document.from_json(row)


def test_a_typed_placeholder_survives_as_literal_text() -> None:
    document = Document((Turn("user", ("Type <image>.",)), Turn("assistant", ("<image>",))))
    assert Document.from_json(json.loads(json.dumps(document.to_json()))) == document


def test_null_text_becomes_none_never() -> None:
    row = chat([{"type": "text", "text": None}, {"type": "text", "text": "What?"}],
               [{"type": "text", "text": None}])  # fmt: skip
    read = read_document(row)
    assert read.document.turns == (Turn("user", ("What?",)), Turn("assistant", ()))
    assert read.remarks == (EMPTY_ANSWER,)


def test_numbers_become_text_with_a_remark() -> None:
    read = read_document(chat([{"type": "text", "text": 5}], 7))
    assert [turn.parts for turn in read.document.turns] == [("5",), ("7",)]
    assert read.remarks == ("numbers read as text",) * 2


def test_unread_keys_with_words_are_counted_by_name() -> None:
    row = chat("?", system="Be kind.", rejected_response="No.")
    row["messages"][1]["reasoning_content"] = "Because."
    row["img_path"] = "a.png"
    assert set(read_document(row).remarks) == {
        "message key 'reasoning_content' is not read", "key 'system' is not read",
        "key 'rejected_response' is not read",
        "key 'img_path' seems to name an image and is not read",
    }  # fmt: skip


# --- message weights ----------------------------------------------------------------------


def weighted(**weight: Any) -> dict[str, Any]:
    row = chat("Hi", "WRONG")
    row["messages"][1].update(weight)
    row["messages"] += chat("Again", "RIGHT")["messages"]
    return row


@pytest.mark.parametrize(
    "weight", [{"weight": 0}, {"loss": False}, {"train": False}, {"training": False},
               {"loss_weight": 0.0}, {"weight": 0, "loss": None}],
)  # fmt: skip
def test_message_weights_lost_in_no_step(
    weight: Any, tmp_path: Path, tokenizer_of_lines: DocumentTokenizer
) -> None:
    row = weighted(**weight)
    document = Document.from_json(row)
    assert document.untrained_turns == (1,)
    assert Document.from_json(json.loads(json.dumps(document.to_json()))) == document
    assert document.to_json()["messages"][1]["weight"] == 0
    tokenized = tokenizer_of_lines(json.dumps(row).encode())
    assert tokenized is not None
    assert tokenized.output_row()["untrained_turns"] == [1]
    checked = check_document(tokenized.output_row(), tokenizer_of_lines)
    vocabulary, text = tokenizer_of_lines.tokenizer.vocabulary, tokenizer_of_lines.tokenizer
    [(start, end)] = checked.trained_spans(vocabulary)
    assert text.decode(tokenized.ids[start : end - 1]) == "RIGHT"
    for name, write in (("t.jsonl", write_token_jsonl), ("t.parquet", write_token_parquet)):
        write(tmp_path / name, iter([tokenized.output_row(), {"tokens": [0, 8800, 2]}]))
        source = TokenDataset(tmp_path / name)
        assert (source.untrained_turns(0), source.untrained_turns(1)) == ((1,), ())
        for pack in (True, False):
            dataset = PackedDataset([(source, 1.0)], vocabulary, PackingConfig(4096, pack))
            labels = torch_labels(dataset[0])
            assert text.decode(text.encode("WRONG")) == "WRONG"
            wrong = set(range(len(tokenized.ids))) - set(range(start, end))
            assert all(labels[i] == IGNORE_INDEX for i in wrong)
            assert labels[start:end] == tokenized.ids[start:end]


def torch_labels(sequence: Any) -> list[int]:
    return list(sequence["labels"].tolist())


@pytest.mark.parametrize("train_on", ["assistant", "all", "images"])
def test_untrained_turns_have_no_labels(train_on: TrainOn, tokenizer: TextTokenizer) -> None:
    vocabulary = tokenizer.vocabulary
    turns = [Turn("user", ("The",)), Turn("assistant", (ImagePart(codes=(1, 2)), "left"))]
    ids = np.array(Document(tuple(turns)).to_ids(tokenizer))
    assert (build_labels(ids, vocabulary, train_on) != IGNORE_INDEX).any()
    start, end = assistant_spans(ids.tolist(), vocabulary)[0]
    masked = build_labels(ids, vocabulary, train_on, (1,))
    assert (masked[start:end] == IGNORE_INDEX).all()
    packed = build_sequence([ids, ids], vocabulary, train_on, [(1,), ()])
    assert packed["labels"].tolist() == [
        *masked.tolist(), *build_labels(ids, vocabulary, train_on).tolist(),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"weight": 0.5}, "'weight' is 0.5 .expected 0 or 1"),
        ({"weight": "0"}, "'weight' is '0'"),
        ({"weight": 0, "loss": True}, "contradict"),
        ({"train_detail": [{"begin_offset": 0}]}, "parts of a message"),
    ],
)
def test_other_weights_are_refused_in_one_line(weight: Any, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        Document.from_json(weighted(**weight))


def test_medmax_labels_refuse_weights(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / "t.jsonl"
    write_token_jsonl(path, iter([{"tokens": [0, 8710, 9000, 2], "untrained_turns": [1]}]))
    with pytest.raises(UserError, match="--compat medmax: MedMax's labels have no weights"):
        PackedDataset(
            [(TokenDataset(path), 1.0)], tokenizer.vocabulary,
            PackingConfig(100, medmax_labels=True),
        )  # fmt: skip


def test_a_question_without_an_answer_is_no_answer(tokenizer_of_lines: DocumentTokenizer) -> None:
    row = {"messages": [{"role": "user", "content": "Why?"}]}
    with pytest.raises(DocumentError, match="no assistant turn"):
        tokenizer_of_lines.tokenize(row)


def test_one_document_false_counts_are_integers(tokenizer_of_lines: DocumentTokenizer) -> None:
    stats, total = TokenizationStats(), TokenizationStats()
    tokenized = tokenizer_of_lines(b'{"text": "a"}')
    assert tokenized is not None
    stats.add_document(tokenized)
    total.merge(stats)
    assert "0 truncated by 0 tokens" in total.report()
    assert {type(count) for count in total.counts().values()} == {int}


# --- files --------------------------------------------------------------------------------


def test_a_data_url_is_opened_and_saved(tmp_path: Path) -> None:
    url = data_url()
    assert open_image(url).size == (4, 4)
    with pytest.raises(ImageError, match="Invalid data URL"):
        open_image("data:image/png;base64,???")
    row = chat([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}])
    sample = documents.read(row, ConversionConfig(path=Path("x"), image_folder=tmp_path))
    (part,) = sample.document.images
    assert Path(str(part.path)).parent == tmp_path
    assert open_image(str(part.path)).getpixel((0, 0)) == (255, 0, 0)


def test_a_name_in_the_other_normal_form_is_opened(tmp_path: Path) -> None:
    path = tmp_path / unicodedata.normalize("NFD", "café.png")
    Image.new("RGB", (4, 4)).save(path)
    assert open_image(unicodedata.normalize("NFC", str(path))).size == (4, 4)


@pytest.mark.parametrize(
    ("name", "hint"), [(r"C:\scans\a.png", "Write / in place of"), ("https://a/b.png", "Download")]
)
def test_the_error_for_a_missing_image_has_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ImageError, match=hint):
        open_image(name)


def test_lfs_pointers_of_data_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    for read in (json_lines, line_ranges, read_prompts):
        with pytest.raises(UserError, match=r"Git LFS pointer.*git lfs pull"):
            list(read(path))  # type: ignore[operator]


def test_prompts_of_chameleon_and_messages_with_images_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": "1", "prompt": "See<img>", "image_urls": ["a.png"]},
            {"messages": [{"role": "user", "content": "<image>?", "note": "x"}],
             "images": ["b.png"]}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(path) == [
        ["See", ImagePart(path="a.png")], [ImagePart(path="b.png"), "?"],
    ]  # fmt: skip
    assert "message key 'note' is not read: 1 times" in capsys.readouterr().err
