"""Formats of the field: recorded cases, there and back, and bad records."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medley.data.document import Document, ImagePart, Turn
from medley.data.vocabulary import IMAGE
from medley.datasets.pathvqa import read_pickle
from medley.datasets.readers import writer
from medley.datasets.registry import FORMATS, ConversionConfig, RecordError, Sample
from medley.datasets.sharegpt import layout_of
from medley.errors import UserError

HERE = ConversionConfig(Path())


def read_all(name: str, choices: ConversionConfig) -> list[Sample]:
    form = FORMATS[name]
    return [form.read(record, choices) for _, _, record in form.records(choices)]


def said(document: Document) -> list[tuple[str, str]]:
    """Roles and words, with a mark for each picture."""
    return [
        (turn.role, "".join(p if isinstance(p, str) else IMAGE for p in turn.parts))
        for turn in document.turns
    ]


# --- recorded cases ---------------------------------------------------------------------------

SQA = golden("llava_convert_sqa.json")


@pytest.mark.parametrize("case", SQA["cases"], ids=lambda c: c["id"])
@pytest.mark.parametrize("compat", ["none", "llava"])
def test_science_qa_equals_the_recorded(
    case: dict[str, Any], compat: Any, tmp_path: Path, exceptions: dict[str, dict[str, str]]
) -> None:
    (tmp_path / "problems.json").write_text(json.dumps(SQA["pool"]["problems"]))
    (tmp_path / "pid_splits.json").write_text(json.dumps(SQA["pool"]["pid_splits"]))
    as_lines = case["input"]["task"] == "convert_to_jsonl"  # LLaVA-Med's, with its own default
    prompt_format = case["input"]["prompt_format"] or ("QCM-LEPA" if as_lines else "QCM-LEA")
    choices = ConversionConfig(tmp_path, prompt_format=prompt_format, compat=compat)
    ours = []
    for sample in read_all("science_qa", choices):
        row = FORMATS["llava"].write(sample, HERE)  # type: ignore[misc]
        ours.append({key: row[key] for key in ("id", "image", "conversations") if key in row})
    (expected,) = case["expected"]["files"].values()
    if as_lines:
        for row in ours:
            asked, answered = (turn["value"] for turn in row.pop("conversations"))
            row |= {"instruction": asked, "output": answered}
    if compat == "none" and case["id"] in exceptions["llava_convert_sqa"]:
        assert ours != expected
        right = {"AL": "Organs have jobs.", "AE": "The heart pumps."}[prompt_format[4:]]
        answer = ours[0]["conversations"][1]["value"]
        assert answer == f"The answer is A. BECAUSE: {right}"
    else:
        assert ours == expected


FACTORY = golden("llamafactory_sharegpt.json")


@pytest.mark.parametrize("case", FACTORY["convert"], ids=lambda c: c["id"])
def test_llama_factorys_examples_equal_the_recorded(
    case: dict[str, Any], tmp_path: Path, exceptions: dict[str, dict[str, str]]
) -> None:
    (entry,) = case["input"]["dataset_info_entry"].values()
    example, expected = case["input"]["example"], case["expected"]["result"]
    info = {"toy": {**entry, "file_name": "toy.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "toy.json").write_text(json.dumps([example]))
    choices = ConversionConfig(tmp_path / "dataset_info.json", image_folder=Path("TMP/media"))
    fault = exceptions["llamafactory_sharegpt"].get(case["id"], "")
    if "name the record" in fault or fault.startswith("as odd"):
        if case["id"] == "missing_media_path_kept":
            assert read_all("sharegpt", choices)[0].document.pictures  # the picture check names it
            return
        with pytest.raises(RecordError):
            read_all("sharegpt", choices)
        return
    if case["id"] == "system_message_with_tag":
        with pytest.raises(RecordError, match="0 <image> for 1 pictures"):
            read_all("sharegpt", choices)
        example["messages"][1]["content"] = "<image>Q"
        expected["_prompt"][0]["content"] = "<image>Q"
        (tmp_path / "toy.json").write_text(json.dumps([example]))
    (sample,) = read_all("sharegpt", choices)
    if fault and "error" in expected:
        assert not sample.document.pictures
        return
    messages = [(m["role"], m["content"]) for m in expected["_prompt"] + expected["_response"]]
    if expected["_system"]:
        messages[0] = ("user", f"{expected['_system']}\n{messages[0][1]}")
    assert said(sample.document) == messages
    assert [p.path for p in sample.document.pictures] == (expected["_images"] or [])


@pytest.mark.parametrize("case", FACTORY["dataset_attr"], ids=lambda c: c["id"])
def test_what_an_entry_leaves_out_is_as_recorded(case: dict[str, Any], tmp_path: Path) -> None:
    if case["id"] == "undefined":
        (tmp_path / "dataset_info.json").write_text("{}")
        with pytest.raises(UserError, match="nope"):
            read_all("sharegpt", ConversionConfig(tmp_path, dataset="nope"))
        return
    (entry,) = case["input"].values()
    found, expected = layout_of(entry), case["expected"]
    assert found["formatting"] == expected["formatting"]
    wanted = {name: expected[name] for name in found["columns"]}
    if found["formatting"] == "alpaca":  # reads no messages
        wanted["messages"] = found["columns"]["messages"]
    if expected["messages"] == "conversations":
        wanted |= {name: found["columns"][name] for name in ("prompt", "query", "response")}
    assert found["columns"] == wanted
    assert found["tags"] == {name: expected[name] for name in found["tags"]}
    if case["id"] == "columns_without_messages":
        info = {"toy": {**entry, "file_name": "toy.json"}}
        (tmp_path / "dataset_info.json").write_text(json.dumps(info))
        (tmp_path / "toy.json").write_text("[]")
        with pytest.raises(UserError, match="without messages"):
            read_all("sharegpt", ConversionConfig(tmp_path))


# --- there and back ---------------------------------------------------------------------------

SPECIAL = [IMAGE, "<reserved08706>", "\n", "a\n", "\nb", "yes", " x ", '"', "a,b", "###"]
SPECIAL += ["What is it?", "Please describe this picture."]
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12) | st.sampled_from(SPECIAL)
pictures = st.integers(0, 9).map(lambda i: ImagePart(path=f"pictures/{i}.png"))


def merged(parts: list[Any]) -> tuple[Any, ...]:
    """Neighbouring texts as one, and empty ones left out: no format tells them apart."""
    found: list[Any] = []
    for part in (p for p in parts if p != ""):
        if found and isinstance(part, str) and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return tuple(found)


@st.composite
def documents(draw: st.DrawFn) -> Document:
    parts = st.lists(texts | pictures, min_size=1, max_size=3).map(merged)
    simple = draw(st.booleans())
    if simple:  # a question about a picture, which most formats hold
        own = [draw(pictures)] if draw(st.booleans()) else []
        return Document((Turn("user", (*own, draw(texts))), Turn("assistant", (draw(texts),))))
    if draw(st.booleans()):
        return Document((Turn("assistant", draw(parts)),))
    count = draw(st.integers(1, 4))
    roles = ("user", "assistant")
    return Document(tuple(Turn(roles[i % 2], draw(parts)) for i in range(count)))


WRITTEN = sorted(name for name, form in FORMATS.items() if form.write is not None)


@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    document=documents(),
    identifier=st.integers(0, 99) | st.text("ab_", min_size=1),
    prompt=st.sampled_from([None, "", "What is it?"]),
)
def test_there_and_back_nothing_is_lost_that_a_format_can_hold(
    name: str, document: Document, identifier: Any, prompt: str | None, tmp_path: Path
) -> None:
    form = FORMATS[name]
    assert form.write is not None
    path = tmp_path / f"out.{form.layout}"
    choices = ConversionConfig(path, image_folder=Path("pictures"), prompt=prompt)
    fields = {"id": identifier, "answer_type": "OPEN", "q_lang": "en", "extra": [1, None]}
    with writer(path, form, choices) as add:
        try:
            add(form.write(Sample(document, fields), choices))
        except RecordError as error:
            assert str(error)  # says what it cannot hold
            if name == "documents":
                pytest.fail("documents hold everything")
            return
    if form.beside is not None:
        for beside, value in form.beside(path.name, choices).items():
            (tmp_path / beside).write_text(json.dumps(value))
    ((_, _, record),) = form.records(choices)
    found = form.read(record, choices)
    if name in ("llava", "sharegpt") and document.turns[0].role == "assistant":
        own = [p for p in document.turns[0].parts[:1] if isinstance(p, ImagePart)]
        rest = document.turns[0].parts[len(own) :]
        document = Document((Turn("user", (*own, prompt or "")), Turn("assistant", rest)))
    assert [t.role for t in found.document.turns] == [t.role for t in document.turns]
    for one, other in zip(found.document.turns, document.turns, strict=True):
        assert merged(list(one.parts)) == merged(list(other.parts))
    if form.layout != "csv":
        assert found.fields["id"] == identifier
        assert found.fields["extra"] == [1, None]


def test_choices_go_there_and_back(tmp_path: Path) -> None:
    row = {
        "Figure_path": "PMC1_F1.jpg", "Question": "What is the pattern?", "Answer": "Focal pattern",
        "Choice A": " A:Diffuse pattern ", "Choice B": " B:Focal pattern ",
        "Choice C": " C:None ", "Choice D": " D:Cannot tell ", "Answer_label": "B",
    }  # fmt: skip
    choices = ConversionConfig(tmp_path / "train.csv", image_folder=tmp_path / "figures")
    form = FORMATS["pmc_vqa"]
    sample = form.read(row, choices)
    assert said(sample.document) == [
        ("user", "<image>What is the pattern?\nA: Diffuse pattern\nB: Focal pattern\nC: None\nD: "
                 "Cannot tell"), ("assistant", "B"),
    ]  # fmt: skip
    assert form.write is not None
    assert form.write(sample, choices) == row
    without = {**row, "Answer_label": "", "Answer": "None"}
    assert said(form.read(without, choices).document)[1] == ("assistant", "C")
    with pytest.raises(RecordError, match="none of its choices"):
        form.read({**row, "Answer_label": "E", "Answer": "else"}, choices)


# --- what each format has of its own ----------------------------------------------------------


def png(path: Path, shade: int = 0) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(path)
    return path.read_bytes()


def test_the_misspelled_key_of_the_alignment_pairs() -> None:
    turns = [{"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": "A toy."}]
    record = {"id": "1_F1", "image": "1_F1.jpg", "domain": {"mri": True}, "conversatons": turns}
    sample = FORMATS["llava"].read(record, HERE)
    assert said(sample.document) == [("user", "Describe.<image>"), ("assistant", "A toy.")]
    assert sample.fields == {"id": "1_F1", "domain": {"mri": True}}


def test_slake_by_language_and_split(tmp_path: Path) -> None:
    rows = [
        {"img_name": "xmlab1/source.jpg", "question": "肝脏?", "answer": "是", "q_lang": "zh",
         "answer_type": "CLOSED", "qid": 1, "img_id": 1},
        {"img_name": "xmlab1/source.jpg", "question": "Liver?", "answer": "Yes", "q_lang": "en",
         "answer_type": "CLOSED", "qid": 2, "img_id": 1},
    ]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(rows[:1]), encoding="utf-8")
    (tmp_path / "validate.json").write_text(json.dumps(rows), encoding="utf-8")
    form = FORMATS["slake"]
    found = list(form.records(ConversionConfig(tmp_path)))
    assert [split for _, split, _ in found] == ["train", "val", "val"]
    (sample,) = read_all("slake", ConversionConfig(tmp_path, split="val", language="en"))
    assert said(sample.document)[0] == ("user", "<image>Liver?")
    assert sample.fields["img_id"] == 1


def test_pathvqas_pickles_are_read_and_run_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "qas" / "val"
    folder.mkdir(parents=True)
    rows = [{"image": "val_0001", "question": "Is it red?", "answer": "yes"},
            {"image": "val_0001", "question": "What?", "answer": "a cell"}]  # fmt: skip
    (folder / "val_qa.pkl").write_bytes(pickle.dumps(rows))
    samples = read_all("pathvqa", ConversionConfig(tmp_path, image_folder=tmp_path / "images"))
    assert [s.fields["answer_type"] for s in samples] == ["CLOSED", "OPEN"]
    assert samples[0].document.pictures[0].path == str(tmp_path / "images/val/val_0001.jpg")

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    (folder / "val_qa.pkl").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(UserError, match="would call"):
        read_pickle(folder / "val_qa.pkl")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("kind", ["parquet", "disk", "folder"])
def test_medtrinity_in_its_three_forms(kind: str, tmp_path: Path) -> None:
    data = png(tmp_path / "source" / "one.png")
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
    (sample,) = read_all("medtrinity", ConversionConfig(path, image_folder=images))
    assert said(sample.document)[1] == ("assistant", "A toy lung.")
    assert sample.document.pictures[0].path == str(images / "case-1.png")
    if kind != "folder":
        assert (images / "case-1.png").read_bytes() == data
        for bad in ("../out", ".hidden", "", "a/b"):
            with pytest.raises(RecordError, match="no name"):
                record = {"image": {"bytes": data}, "id": bad, "caption": "x"}
                FORMATS["medtrinity"].read(record, ConversionConfig(path, image_folder=images))


def test_medmaxs_rows_that_need_credentials(tmp_path: Path) -> None:
    from medley.data.image_token_store import write_partition

    row = {"text": "<image>Why?<reserved08706>So.", "credential": "yes", "source": "mimic",
           "id": "study7"}  # fmt: skip
    form = FORMATS["medmax"]
    with pytest.raises(RecordError, match="credentials"):
        form.read(row, HERE)
    codes = np.array([[1, 2, 3, 4]], np.uint16)
    write_partition(tmp_path / "partition_0_rank_0.parquet", ["x/study7.jpg"], codes, [])
    sample = form.read(row, ConversionConfig(tmp_path, image_codes=tmp_path))
    assert sample.document.pictures[0].codes == (1, 2, 3, 4)
    with pytest.raises(RecordError, match="study8"):
        form.read({**row, "id": "study8"}, ConversionConfig(tmp_path, image_codes=tmp_path))


def test_records_by_their_id_in_one_object(tmp_path: Path) -> None:
    path = tmp_path / "pubmedqa.json"
    path.write_text('{\n "11": {"QUESTION": "Do toys help?", "final_decision": "maybe"}\n}')
    choices = ConversionConfig(path, question_key="QUESTION", answer_key="final_decision")
    (sample,) = read_all("text_qa", choices)
    assert said(sample.document) == [("user", "Do toys help?"), ("assistant", "maybe")]
    assert sample.fields["id"] == "11"


# --- bad records ------------------------------------------------------------------------------
