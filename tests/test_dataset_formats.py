"""Dataset formats: recorded cases of other projects, round trips, and each format's own layout."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import golden
from dataset_records import read_all, role_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medley.data.document import Document, ImagePart, Turn
from medley.data.vocabulary import IMAGE
from medley.datasets.base import CAPTION_PROMPT, ConversionConfig, RecordError, Sample
from medley.datasets.pathvqa import read_pickle
from medley.datasets.readers import open_writer
from medley.datasets.registry import FORMATS, FormatName, make_config
from medley.datasets.sharegpt import parse_layout
from medley.errors import UserError

HERE = ConversionConfig(Path())

# --- recorded cases ---------------------------------------------------------------------------

SQA = golden("llava_convert_sqa.json")


@pytest.mark.parametrize("case", SQA["cases"], ids=lambda c: c["id"])
@pytest.mark.parametrize("compat", ["none", "llava"])
def test_science_qa_equals_llava_converter(
    case: dict[str, Any], compat: Any, tmp_path: Path, exceptions: dict[str, dict[str, str]]
) -> None:
    (tmp_path / "problems.json").write_text(json.dumps(SQA["pool"]["problems"]))
    (tmp_path / "pid_splits.json").write_text(json.dumps(SQA["pool"]["pid_splits"]))
    is_jsonl = case["input"]["task"] == "convert_to_jsonl"  # LLaVA-Med's, with another default
    prompt_format = case["input"]["prompt_format"] or ("QCM-LEPA" if is_jsonl else "QCM-LEA")
    config = ConversionConfig(tmp_path, prompt_format=prompt_format, compat=compat)
    ours = []
    for sample in read_all("science_qa", config):
        row = FORMATS["llava"].write(sample, HERE)  # type: ignore[misc]
        ours.append({key: row[key] for key in ("id", "image", "conversations") if key in row})
    (expected,) = case["expected"]["files"].values()
    if is_jsonl:
        for row in ours:
            question, answer = (turn["value"] for turn in row.pop("conversations"))
            row |= {"instruction": question, "output": answer}
    if compat == "none" and case["id"] in exceptions["llava_convert_sqa"]:
        assert ours != expected
        reason = {"AL": "Organs have jobs.", "AE": "The heart pumps."}[prompt_format[4:]]
        answer = ours[0]["conversations"][1]["value"]
        assert answer == f"The answer is A. BECAUSE: {reason}"
    else:
        assert ours == expected


FACTORY = golden("llamafactory_sharegpt.json")
# Cases of tests/golden_exceptions.json: LLaMA-Factory skips these records silently, Medley rejects
# them; and it fails on records without images, which Medley reads as text.
REJECTED = {
    "odd_message_count_skipped", "two_users_in_row_skipped", "unknown_role_skipped",
    "empty_messages", "alpaca_non_string_output",
}  # fmt: skip
TEXT_ONLY = {"images_key_missing", "llava_record_without_image"}


@pytest.mark.parametrize("case", FACTORY["convert"], ids=lambda c: c["id"])
def test_records_equal_llama_factory(
    case: dict[str, Any], tmp_path: Path, exceptions: dict[str, dict[str, str]]
) -> None:
    (entry,) = case["input"]["dataset_info_entry"].values()
    example, expected = case["input"]["example"], case["expected"]["result"]
    info = {"toy": {**entry, "file_name": "toy.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "toy.json").write_text(json.dumps([example]))
    config = ConversionConfig(tmp_path / "dataset_info.json", image_folder=Path("TMP/media"))
    assert (case["id"] in exceptions["llamafactory_sharegpt"]) == (
        case["id"] in {*REJECTED, *TEXT_ONLY, "missing_media_path_kept", "system_message_with_tag"}
    )
    if case["id"] in REJECTED:
        with pytest.raises(RecordError):
            read_all("sharegpt", config)
        return
    if case["id"] == "missing_media_path_kept":
        assert read_all("sharegpt", config)[0].document.images  # ImageValidator rejects the record
        return
    if case["id"] == "system_message_with_tag":
        with pytest.raises(RecordError, match="got 0, expected 1"):
            read_all("sharegpt", config)
        example["messages"][1]["content"] = "<image>Q"
        expected["_prompt"][0]["content"] = "<image>Q"
        (tmp_path / "toy.json").write_text(json.dumps([example]))
    (sample,) = read_all("sharegpt", config)
    if case["id"] in TEXT_ONLY:
        assert not sample.document.images
        return
    messages = [(m["role"], m["content"]) for m in expected["_prompt"] + expected["_response"]]
    if expected["_system"]:
        messages[0] = ("user", f"{expected['_system']}\n{messages[0][1]}")
    assert role_texts(sample.document) == messages
    assert [image.path for image in sample.document.images] == (expected["_images"] or [])


@pytest.mark.parametrize("case", FACTORY["dataset_attr"], ids=lambda c: c["id"])
def test_layout_defaults_equal_llama_factory(case: dict[str, Any], tmp_path: Path) -> None:
    if case["id"] == "undefined":
        (tmp_path / "dataset_info.json").write_text("{}")
        with pytest.raises(UserError, match="There is no dataset nope"):
            read_all("sharegpt", ConversionConfig(tmp_path, dataset="nope"))
        return
    (entry,) = case["input"].values()
    layout, expected = parse_layout(entry), case["expected"]
    assert layout.formatting == expected["formatting"]
    columns = {name: expected[name] for name in layout.columns}
    if layout.formatting == "alpaca":  # has no messages
        columns["messages"] = layout.columns["messages"]
    if expected["messages"] == "conversations":
        columns |= {name: layout.columns[name] for name in ("prompt", "query", "response")}
    assert layout.columns == columns
    assert layout.tags == {name: expected[name] for name in layout.tags}
    if case["id"] == "columns_without_messages":
        info = {"toy": {**entry, "file_name": "toy.json"}}
        (tmp_path / "dataset_info.json").write_text(json.dumps(info))
        (tmp_path / "toy.json").write_text("[]")
        with pytest.raises(UserError, match="without messages"):
            read_all("sharegpt", ConversionConfig(tmp_path))


# --- round trips ------------------------------------------------------------------------------

SPECIAL = [IMAGE, "<reserved08706>", "\n", "a\n", "\nb", "yes", " x ", '"', "a,b", "###"]
SPECIAL += ["What is it?", CAPTION_PROMPT]
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12) | st.sampled_from(SPECIAL)
image_parts = st.integers(0, 9).map(lambda i: ImagePart(path=f"images/{i}.png"))


def merge_texts(parts: list[Any]) -> tuple[Any, ...]:
    """Joins neighboring texts and drops empty ones, which no format distinguishes."""
    merged: list[Any] = []
    for part in (p for p in parts if p != ""):
        if merged and isinstance(part, str) and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


@st.composite
def documents(draw: st.DrawFn) -> Document:
    parts = st.lists(texts | image_parts, min_size=1, max_size=3).map(merge_texts)
    if draw(st.booleans()):  # a question about an image, which most formats can represent
        image = [draw(image_parts)] if draw(st.booleans()) else []
        return Document((Turn("user", (*image, draw(texts))), Turn("assistant", (draw(texts),))))
    if draw(st.booleans()):
        return Document((Turn("assistant", draw(parts)),))
    count = draw(st.integers(1, 4))
    roles = ("user", "assistant")
    return Document(tuple(Turn(roles[i % 2], draw(parts)) for i in range(count)))


WRITTEN = sorted(name for name, spec in FORMATS.items() if spec.write is not None)


@pytest.mark.parametrize("name", WRITTEN)
@settings(
    max_examples=hostile.scaled(150), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    document=documents(),
    identifier=st.integers(0, 99) | st.text("ab_", min_size=1),
    prompt=st.sampled_from([None, "", "What is it?"]),
)
def test_round_trip_preserves_every_document_that_the_format_accepts(
    name: FormatName, document: Document, identifier: Any, prompt: str | None, tmp_path: Path
) -> None:
    spec = FORMATS[name]
    assert spec.write is not None
    path = tmp_path / f"out.{spec.layout}"
    config = ConversionConfig(path, image_folder=Path("images"), prompt=prompt)
    fields = {"id": identifier, "answer_type": "OPEN", "q_lang": "en", "extra": [1, None]}
    with open_writer(path, spec, config) as add:
        try:
            add(spec.write(Sample(document, fields), config))
        except RecordError as error:
            assert str(error)
            if name == "documents":
                pytest.fail("The documents format must accept every document.")
            return
    if spec.sidecar_files is not None:
        for sidecar, content in spec.sidecar_files(path.name, config).items():
            (tmp_path / sidecar).write_text(json.dumps(content))
    ((_, _, record),) = spec.records(config)
    result = spec.read(record, config)
    if name in ("llava", "sharegpt") and document.turns[0].role == "assistant":
        image = [p for p in document.turns[0].parts[:1] if isinstance(p, ImagePart)]
        rest = document.turns[0].parts[len(image) :]
        document = Document((Turn("user", (*image, prompt or "")), Turn("assistant", rest)))
    assert [t.role for t in result.document.turns] == [t.role for t in document.turns]
    for turn, expected in zip(result.document.turns, document.turns, strict=True):
        assert merge_texts(list(turn.parts)) == merge_texts(list(expected.parts))
    if spec.layout != "csv":
        assert result.fields["id"] == identifier
        assert result.fields["extra"] == [1, None]


def test_pmc_vqa_round_trip(tmp_path: Path) -> None:
    row = {
        "Figure_path": "PMC1_F1.jpg", "Question": "What is the pattern?", "Answer": "Focal pattern",
        "Choice A": " A:Diffuse pattern ", "Choice B": " B:Focal pattern ",
        "Choice C": " C:None ", "Choice D": " D:Cannot tell ", "Answer_label": "B",
    }  # fmt: skip
    config = ConversionConfig(tmp_path / "train.csv", image_folder=tmp_path / "figures")
    spec = FORMATS["pmc_vqa"]
    sample = spec.read(row, config)
    assert role_texts(sample.document) == [
        ("user", "<image>What is the pattern?\nA: Diffuse pattern\nB: Focal pattern\nC: None\nD: "
                 "Cannot tell"), ("assistant", "B"),
    ]  # fmt: skip
    assert spec.write is not None
    assert spec.write(sample, config) == row
    without_label = {**row, "Answer_label": "", "Answer": "None"}
    assert role_texts(spec.read(without_label, config).document)[1] == ("assistant", "C")
    with pytest.raises(RecordError, match="not one of the choices"):
        spec.read({**row, "Answer_label": "E", "Answer": "else"}, config)


# --- layouts of single formats ----------------------------------------------------------------


def test_config_uses_the_published_image_folder_unless_one_is_given(tmp_path: Path) -> None:
    folder = tmp_path
    assert make_config("vqa_rad", folder, HERE).image_folder == folder / "images"
    given_folder = ConversionConfig(Path(), image_folder=Path("x"))
    assert make_config("vqa_rad", folder, given_folder).image_folder == Path("x")
    assert make_config("llava", folder, HERE, find_images=False).image_folder is None
    with pytest.raises(UserError, match="published without splits"):
        make_config("llava", folder, ConversionConfig(Path(), split="test"))


def test_llava_reads_the_misspelled_key_of_the_alignment_pairs() -> None:
    turns = [{"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": "A toy."}]
    record = {"id": "1_F1", "image": "1_F1.jpg", "domain": {"mri": True}, "conversatons": turns}
    sample = FORMATS["llava"].read(record, HERE)
    assert role_texts(sample.document) == [("user", "Describe.<image>"), ("assistant", "A toy.")]
    assert sample.fields == {"id": "1_F1", "domain": {"mri": True}}


def test_slake_selects_language_and_split(tmp_path: Path) -> None:
    rows = [
        {"img_name": "xmlab1/source.jpg", "question": "肝脏?", "answer": "是", "q_lang": "zh",
         "answer_type": "CLOSED", "qid": 1, "img_id": 1},
        {"img_name": "xmlab1/source.jpg", "question": "Liver?", "answer": "Yes", "q_lang": "en",
         "answer_type": "CLOSED", "qid": 2, "img_id": 1},
    ]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(rows[:1]), encoding="utf-8")
    (tmp_path / "validate.json").write_text(json.dumps(rows), encoding="utf-8")
    records = list(FORMATS["slake"].records(ConversionConfig(tmp_path)))
    assert [split for _, split, _ in records] == ["train", "val", "val"]
    (sample,) = read_all("slake", ConversionConfig(tmp_path, split="val", language="en"))
    assert role_texts(sample.document)[0] == ("user", "<image>Liver?")
    assert sample.fields["img_id"] == 1


def test_pathvqa_pickles_are_read_without_executing_code(tmp_path: Path) -> None:
    folder = tmp_path / "qas" / "val"
    folder.mkdir(parents=True)
    rows = [{"image": "val_0001", "question": "Is it red?", "answer": "yes"},
            {"image": "val_0001", "question": "What?", "answer": "a cell"}]  # fmt: skip
    (folder / "val_qa.pkl").write_bytes(pickle.dumps(rows))
    samples = read_all("pathvqa", ConversionConfig(tmp_path, image_folder=tmp_path / "images"))
    assert [s.fields["answer_type"] for s in samples] == ["CLOSED", "OPEN"]
    assert samples[0].document.images[0].path == str(tmp_path / "images/val/val_0001.jpg")

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    (folder / "val_qa.pkl").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(UserError, match="would call"):
        read_pickle(folder / "val_qa.pkl")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("kind", ["parquet", "disk", "folder"])
def test_medtrinity_reads_all_layouts(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "one.png"
    Image.new("RGB", (4, 4)).save(source)
    data = source.read_bytes()
    images = tmp_path / "images"
    table = pa.table({
        "image": [{"bytes": data, "path": None}], "id": ["case-1"], "caption": ["A toy lung."],
    })  # fmt: skip
    path = tmp_path / "data"
    path.mkdir()
    if kind == "parquet":
        pq.write_table(table, path / "part.parquet")
    elif kind == "disk":
        with (
            pa.OSFile(str(path / "data-0.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as stream,
        ):
            stream.write_table(table)
        (path / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    else:
        row = {"file_name": "case-1.png", "caption": "A toy lung.", "id": "case-1"}
        (path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    config = ConversionConfig(path, image_folder=images)
    (sample,) = read_all("medtrinity", config)
    assert role_texts(sample.document)[1] == ("assistant", "A toy lung.")
    assert sample.document.images[0].path == str(images / "case-1.png")
    if kind != "folder":
        assert (images / "case-1.png").read_bytes() == data
        for unsafe in ("../out", ".hidden", "", "a/b", "a\\b", "-x", " x", "x" * 300, "a\nb"):
            record = {"image": {"bytes": data}, "id": unsafe, "caption": "x"}
            read = FORMATS["medtrinity"].read(record, config)
            assert read.remarks == ("embedded images saved under a made-up name",)
            path = Path(str(read.document.images[0].path))
            assert path.parent == images
            assert path.read_bytes() == data


def test_medmax_records_that_require_credentials(tmp_path: Path) -> None:
    from medley.data.image_token_store import write_partition

    row = {"text": "<image>Why?<reserved08706>So.", "credential": "yes", "source": "mimic",
           "id": "study7"}  # fmt: skip
    spec = FORMATS["medmax"]
    with pytest.raises(RecordError, match="requires credentials"):
        spec.read(row, HERE)
    codes = np.array([[1, 2, 3, 4]], np.uint16)
    write_partition(tmp_path / "partition_0_rank_0.parquet", ["x/study7.jpg"], codes, [])
    config = ConversionConfig(tmp_path, image_codes=tmp_path)
    assert spec.read(row, config).document.images[0].codes == (1, 2, 3, 4)
    with pytest.raises(RecordError, match="no image codes for study8"):
        spec.read({**row, "id": "study8"}, config)


def test_text_qa_reads_an_object_of_records_by_id(tmp_path: Path) -> None:
    path = tmp_path / "pubmedqa.json"
    path.write_text('{\n "11": {"QUESTION": "Do toys help?", "final_decision": "maybe"}\n}')
    config = ConversionConfig(path, question_key="QUESTION", answer_key="final_decision")
    (sample,) = read_all("text_qa", config)
    assert role_texts(sample.document) == [("user", "Do toys help?"), ("assistant", "maybe")]
    assert sample.fields["id"] == "11"
