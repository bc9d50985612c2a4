"""Files of users' datasets: embedded images, tables of hubs, encodings, and hostile tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_records import MESSAGES, TURNS, convert, png, role_texts, write_json

from medley.datasets.base import ConversionConfig, RecordError
from medley.datasets.input_files import SPLIT_NAMES, split_of
from medley.datasets.readers import records_of
from medley.datasets.registry import FORMATS, FormatName, make_config
from medley.datasets.samples import read_record
from medley.errors import UserError
from medley.evaluation.questions import read_questions
from medley.utils import tables


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images p0.png to p2.png."""
    for number in range(3):
        (tmp_path / f"p{number}.png").write_bytes(png(number))
    return tmp_path


@pytest.mark.parametrize("name", sorted(SPLIT_NAMES))
def test_splits_by_the_name_of_a_file_or_folder(name: str, tmp_path: Path) -> None:
    split = SPLIT_NAMES[name]
    for file in (f"{name}.csv", f"{name.upper()}-00000-of-00001.parquet", f"x_{name}/0.parquet"):
        assert split_of(tmp_path / file, tmp_path) == split
    assert split_of(tmp_path / f"x{name}.csv", tmp_path) == ""
    assert split_of(tmp_path / f"{name}s.csv", tmp_path) == ""


# --- embedded images --------------------------------------------------------------------------

EMBEDDED: dict[FormatName, tuple[str, dict[str, Any]]] = {
    "llava": ("image", {"id": "a b", "conversations": TURNS}),
    "sharegpt": ("images", {"messages": MESSAGES}),
    "documents": ("images", {"messages": MESSAGES}),
    "captions": ("image", {"caption": "A scan."}),
    "medtrinity": ("image", {"caption": "A scan."}),
    "vqa_rad": ("image", {"question": "What?", "answer": "yes"}),
    "slake": ("image", {"question": "What?", "answer": "yes"}),
    "pathvqa": ("image", {"question": "What?", "answer": "yes"}),
    "pmc_vqa": ("image", {"Question": "a", "Answer": "b", "Choice A": "b", "Choice B": "c",
                          "Choice C": "d", "Choice D": "e", "Answer_label": "A"}),
    "science_qa": ("image", {"question": "a", "choices": ["b", "c"], "answer": 1, "hint": "",
                             "lecture": "", "solution": ""}),
}  # fmt: skip


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["struct", "bytes", "list"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_embedded_images_are_saved_in_every_format(
    name: FormatName, suffix: str, kind: str, tmp_path: Path
) -> None:
    key, record = EMBEDDED[name]
    images: list[Any] = [{"bytes": png(n), "path": None} for n in range(2)]
    values = {
        "struct": images, "bytes": [i["bytes"] for i in images], "list": [[i] for i in images],
    }  # fmt: skip
    rows = [{**record, key: value} for value in values[kind]]
    path = write_table(tmp_path / f"train-00000-of-00001.{suffix}", rows)
    config = make_config(name, path, ConversionConfig(path, image_folder=tmp_path / "saved"))
    samples = [read_record(FORMATS[name], r, config) for _, _, r in FORMATS[name].records(config)]
    data = [Path(str(sample.document.images[0].path)).read_bytes() for sample in samples]
    assert data == [png(0), png(1)]
    assert all(Path(str(s.document.images[0].path)).parent == tmp_path / "saved" for s in samples)
    assert all(role_texts(s.document)[0][1].count("<image>") == 1 for s in samples)


@pytest.mark.parametrize(
    "layout",
    [
        "data/train-00000-of-00001-abc.parquet",  # downloaded from a hub
        "models--x/snapshots/0123/data/train-00000-of-00001.parquet",  # a hub's cache
        "x___vqa-rad/default/0.0.0/0123/vqa-rad-train.arrow",  # load_dataset(cache_dir=)
        "x___y/default/0.0.0/0123/y-train-00000-of-00002.arrow",
        "train/data-00000-of-00001.arrow",  # save_to_disk
    ],
)
@pytest.mark.parametrize("name", ["vqa_rad", "pathvqa", "medtrinity"])
def test_tables_of_hubs_and_caches_are_found_with_their_split(
    name: FormatName, layout: str, tmp_path: Path
) -> None:
    key, record = EMBEDDED[name]
    write_table(tmp_path / "in" / layout, [{**record, key: {"bytes": png(), "path": None}}])
    config = make_config(name, tmp_path / "in", ConversionConfig(tmp_path, image_folder=tmp_path))
    ((_, split, _),) = FORMATS[name].records(config)
    assert split == ("" if name == "medtrinity" else "train")
    if name != "medtrinity":
        with pytest.raises(UserError, match=r"has no such split \(expected one of train"):
            list(FORMATS[name].records(make_config(
                name, tmp_path / "in", ConversionConfig(tmp_path, split="test"))))  # fmt: skip


def test_same_table_in_two_revisions_is_refused(tmp_path: Path) -> None:
    for revision in ("a", "b"):
        write_table(tmp_path / revision / "train.parquet", [{"image": png(), "caption": "x"}])
    with pytest.raises(UserError, match=r"Several folders contain a table train train\.parquet"):
        list(FORMATS["medtrinity"].records(ConversionConfig(tmp_path)))


def test_embedded_images_with_the_same_name_are_all_kept(tmp_path: Path) -> None:
    config = ConversionConfig(tmp_path, image_folder=tmp_path / "saved")
    spec = FORMATS["medtrinity"]
    samples = [
        spec.read({"id": "a b (1)", "image": {"bytes": png(n)}, "caption": "x"}, config)
        for n in (0, 1, 0)
    ]
    paths = [str(s.document.images[0].path) for s in samples]
    assert Path(paths[0]).name == "a b (1).png"
    assert paths[2] == paths[0] != paths[1]
    assert Path(paths[1]).read_bytes() == png(1)
    assert [bool(s.remarks) for s in samples] == [False, True, False]


@pytest.mark.parametrize("data", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_embedded_bytes_that_are_no_image_are_refused(data: bytes, tmp_path: Path) -> None:
    config = ConversionConfig(tmp_path, image_folder=tmp_path)
    with pytest.raises(RecordError):
        FORMATS["medtrinity"].read({"id": "a", "image": data, "caption": "x"}, config)
    assert not list(tmp_path.iterdir())


def test_questions_in_tables_have_their_embedded_images(tmp_path: Path) -> None:
    image = {"bytes": png(), "path": None}
    rows = [{"image": image, "question": "Left?", "answer": "yes", "mask": image}]
    path = write_table(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    config = make_config("vqa_rad", tmp_path, ConversionConfig(path, image_folder=tmp_path / "x"))
    (question,) = read_questions(tmp_path, "vqa_rad", config)
    assert (question.gold, question.kind, question.text) == ("yes", "CLOSED", "Left?")
    assert Path(str(question.image)).read_bytes() == png()
    json.dumps(question.fields)
    path = write_table(tmp_path / "q.parquet", [{"question_id": 4, "text": "a", "images": [image]}])
    (question,) = read_questions(path, "llava", ConversionConfig(path, image_folder=tmp_path / "x"))
    assert Path(str(question.image)).name == "4.png"


def test_bytes_beside_the_image_are_left_out_with_a_remark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = {"bytes": png(), "path": None}
    rows = [{"image": image, "caption": "A scan.", "mask": image}]
    path = write_table(tmp_path / "a.parquet", rows)
    status, (row,) = convert(tmp_path, "medtrinity", path)
    assert status == 0
    assert "mask" not in row
    assert "field 'mask' holds bytes and is left out: 1 times" in capsys.readouterr().out


# --- files ------------------------------------------------------------------------------------


def test_csv_with_semicolons_or_tabs_is_read(tmp_path: Path) -> None:
    for delimiter in (",", ";", "\t"):
        path = tmp_path / "a.csv"
        path.write_text(f'question{delimiter}answer\n"a{delimiter} b"{delimiter}1\n')
        assert [r for _, _, r in records_of(path)] == [
            {"question": f"a{delimiter} b", "answer": "1"}]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b"question,answer\nWo?,Gr\xfc\xdfe\n"),
        ("a.csv", b"question,gr\xfc\xdfe\na,b\n"),
        ("a.csv", "question,answer\na,b\n".encode("utf-16")),
        ("a.jsonl", b'{"question": "Gr\xfc\xdfe", "answer": "a"}\n'),
        ("a.json", b'[{"question": "Gr\xfc\xdfe", "answer": "a"}]'),
    ],
)
def test_other_encodings_are_refused_with_the_fix(
    name: str, data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    assert convert(tmp_path, "text_qa", tmp_path / name)[0] in (2, 3)
    assert "iconv -f WINDOWS-1252" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.arrow"])
def test_pointer_of_git_lfs_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert convert(tmp_path, "llava", tmp_path / name)[0] == 2
    assert "Git LFS pointer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("images\\p0.png", "Write / in place of \\"),
        ("https://example.org/p0.png", "Download it"),
        ("s3://bucket/p0.png", "Download it"),
        ("data:image/png;base64,AAAA", "Save the embedded image to a file"),
    ],
)
def test_image_names_of_windows_and_addresses_get_a_hint(
    name: str, hint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_json(folder / "d.json", [{"id": 1, "image": name, "conversations": TURNS}])
    assert convert(folder, "llava", path)[0] == 3
    assert hint in capsys.readouterr().err


def shared(values: int, length: int) -> pa.Array:
    indices = pa.array(np.zeros(values, np.int32))
    return pa.DictionaryArray.from_arrays(indices, pa.array(["x" * length]))


def test_parquet_with_one_long_shared_value_is_read_in_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_BATCH_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": shared(1000, 1 << 17)}), path, store_schema=False)
    assert path.stat().st_size < 20_000
    batches = tables.parquet_batches(path, 256)
    assert next(batches).num_rows < 8
    assert sum(batch.num_rows for batch in batches) > 990


@pytest.mark.parametrize("kind", ["value", "list of texts", "list of numbers"])
def test_parquet_row_that_expands_beyond_memory_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_BATCH_BYTES", 1 << 20)
    count = 1 << 16
    column = {
        "value": pa.array(["x" * (1 << 23)]),
        "list of texts": pa.ListArray.from_arrays(pa.array([0, count], pa.int32()),
                                                  shared(count, 1 << 10)),
        "list of numbers": pa.ListArray.from_arrays(pa.array([0, count], pa.int32()),
                                                    pa.array(np.zeros(count, np.int64))),
    }[kind]  # fmt: skip
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": column}), path, store_schema=False, compression="zstd")
    with pytest.raises(UserError, match=r"The column a.* may expand to"):
        list(records_of(path))


def test_truncated_tables_keep_their_read_rows_or_are_refused(tmp_path: Path) -> None:
    rows = [{"a": "x" * 100, "n": n} for n in range(1000)]
    for suffix in ("parquet", "arrow"):
        path = write_table(tmp_path / f"a.{suffix}", rows)
        path.write_bytes(path.read_bytes()[:-3000])
        with pytest.raises(UserError, match="The file is not"):
            list(records_of(path))
