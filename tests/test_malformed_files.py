"""Malformed files of all kinds end in one clear line, or have the result of the intact file."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import malformed_files
import pyarrow as pa
import pytest
import torch
import yaml
from conftest import GOLDEN, ROOT, TIMEOUT

import medley
from medley.checkpoints.adapter import load_adapter
from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import write_hugging_face
from medley.datasets.readers import records_of
from medley.errors import UserError
from medley.utils.config_files import MAX_DEPTH, read_json_object, read_yaml_object
from medley.utils.tensor_files import ShardedTensors, load_tensors

ALL_KINDS = list(malformed_files.KINDS)
INPUT = GOLDEN / "checkpoints" / "chameleon_7b_layout" / "input"


def kind_groups() -> list[list[str]]:
    """The kinds that one process reads: all of them, or a few, so that processes share the work."""
    if not hostile.is_long():
        return [ALL_KINDS]
    return [ALL_KINDS[start : start + 4] for start in range(0, len(ALL_KINDS), 4)]


@pytest.mark.slow
@pytest.mark.hostile
@pytest.mark.parametrize("kinds", kind_groups(), ids=lambda kinds: kinds[0])
def test_mutated_files_are_refused_in_one_line_or_read_as_before(
    kinds: list[str], tmp_path: Path
) -> None:
    count = hostile.scaled(3)
    seed = "0"
    command = [sys.executable, "tests/malformed_files.py", seed, str(count), str(tmp_path), *kinds]
    done = subprocess.run(
        command, cwd=ROOT, env=malformed_files.environment(), capture_output=True, text=True,
        timeout=4 * TIMEOUT, check=False,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"{rows[-1:]}\n{done.stderr[-4000:]}"
    finished = [row for row in rows if row["outcome"] != "ends the process"]
    assert len(finished) == count * len(kinds)
    bad = [row for row in finished if row["outcome"] not in ("refused", "equal", "other")]
    assert not bad, "\n\n".join(f"{r['kind']}: {r['label']}\n{r['message']}" for r in bad[:10])
    # The mutations reach the readers. Some files are not read, such as generation_config.json.
    assert Counter(row["outcome"] for row in finished)["refused"] > count * len(kinds) // 20


# --- objects in JSON and YAML -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", r"Not a JSON object \(got \[\]\)"),
        (b"null", "Not a JSON object"),
        (b'"x"', "Not a JSON object"),
        (b"", "Invalid JSON"),
        (b"{", "Invalid JSON"),
        (b"\xff\xfe{\0}\0", "Not UTF-8"),
        (b'{"a": 1, "a": 2}', "'a' has two different values"),
        (b'{"b": {"a": 1, "a": [2]}}', "'a' has two different values"),
        (b'{"a":' * 100_000, "Nested too deeply"),
        (b"[" * 100_000, "Nested too deeply"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "Nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Invalid JSON .*digits"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    ],
)
def test_json_objects_are_bounded(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"a.json: .*{reason}"):
        read_json_object(path)


def test_json_objects_with_a_mark_or_equal_duplicates_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('\ufeff{"a": 1, "a": 1, "é": [{}]}'.encode())
    assert read_json_object(path) == {"a": 1, "é": [{}]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("- 1", r"Not a YAML object \(got \[1\]\)"),
        ("", "Not a YAML object"),
        ("a: [", "Invalid YAML"),
        ("a: 1\na: 2", "'a' has two different values"),
        ("a: &x [1]\nb: *x", "aliases are not supported"),
        ("a: !!python/object/apply:os.getcwd []", "Invalid YAML"),
        ("a: 2001-99-99", "Invalid YAML"),
        ("a: " + "9" * 5000, "Invalid YAML"),
        ("1: a", "A key is not a string"),
        ("[" * 100_000, "Nested too deeply"),
        ("a: " + "[" * MAX_DEPTH + "]" * MAX_DEPTH, "Nested too deeply"),
        ("# a\n" * 100_000, "too large"),
    ],
)
def test_yaml_objects_are_bounded(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=f"a.yaml: .*{reason}") as raised:
        read_yaml_object(path)
    assert "\n" not in str(raised.value)


# --- fields -----------------------------------------------------------------------------------


def changed(source: Path, folder: Path, file: str, path: str, value: Any) -> Path:
    """A copy of a folder in which one field of a JSON or YAML file has another value."""
    shutil.copytree(source, folder)
    is_yaml = file.endswith(".yaml")
    text = (folder / file).read_text()
    content = yaml.safe_load(text) if is_yaml else json.loads(text)
    *parents, name = path.split(".")
    inner = content
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    (folder / file).write_text(yaml.safe_dump(content) if is_yaml else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("model", [], r"Invalid model \(got \[\]"),
        ("model.dim", 10**30, r"Invalid model.dim \(got 1000"),
        ("model.dim", "x", r"Invalid model.dim \(got 'x'"),
        ("model.dim", 96, "model.dim does not fit the weights"),
        ("model.n_layers", 10**9, r"model.n_layers does not fit the weights \(got 10+, expected 2"),
        ("model.n_heads", 0, "Invalid model.n_heads"),
        ("model.n_heads", 5, "model.n_heads"),
        ("model.n_kv_heads", 10**9, "Invalid model.n_kv_heads"),
        ("model.max_seq_len", "x", "Invalid model.max_seq_len"),
        ("model.norm_eps", float("nan"), "Invalid model.norm_eps"),
        ("model.rope_theta", -1, "Invalid model.rope_theta"),
        ("model.swin_norm", "no", "Invalid model.swin_norm"),
        ("model_parallel_size", {}, "Invalid model_parallel_size"),
    ],
)
def test_params_name_the_field(field: str, value: Any, reason: str, tmp_path: Path) -> None:
    folder = changed(INPUT, tmp_path / "c", "models/7b/params.json", field, value)
    with pytest.raises(UserError, match=f"params.json: .*{reason}"):
        open_checkpoint(folder).decoder()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("ch", 10**30, r"vqgan.yaml: Invalid ch \(got 1000"),
        ("ch", 64, "do not fit ch and ch_mult of the configuration"),
        ("ch_mult", [-1], "vqgan.yaml: Invalid ch_mult"),
        ("ch_mult", [1] * 99, "vqgan.yaml: Invalid ch_mult"),
        ("num_res_blocks", 10**9, "do not fit num_res_blocks of the configuration"),
        ("dropout", 1e30, r"vqgan.yaml: Invalid dropout \(got 1e\+30"),
        ("resolution", 10**9, "vqgan.yaml: Invalid resolution"),
        ("attn_resolutions", "x", "vqgan.yaml: Invalid attn_resolutions"),
        ("in_channels", None, "vqgan.yaml: Invalid in_channels"),
    ],
)
def test_vqgan_sizes_name_the_field(field: str, value: Any, reason: str, tmp_path: Path) -> None:
    folder = changed(
        INPUT, tmp_path / "c", "tokenizer/vqgan.yaml", f"model.params.ddconfig.{field}", value
    )
    with pytest.raises(UserError, match=reason):
        open_checkpoint(folder).vqgan()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    malformed_files.KINDS["config.json"].make(folder)
    return folder / "hf"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("num_hidden_layers", 10**9, r"num_hidden_layers does not fit .* \(got 10+, expected 2"),
        ("hidden_size", 10**30, r"Invalid hidden_size \(got 1000"),
        ("vocab_size", 7, "vocab_size does not fit the weights"),
        ("num_labels", 10**9, "Invalid num_labels"),
        ("rms_norm_eps", "x", "Invalid rms_norm_eps"),
        ("vocabulary_map", {"a": -1}, "Invalid vocabulary_map.a"),
        ("vq_config", "x", "Invalid configuration .*vq_config"),
        ("vq_config.attn_resolutions", 10**30, "attn_resolutions"),
        ("vq_config.base_channels", 10**30, "Invalid vq_config.base_channels"),
        ("vq_config.num_res_blocks", 10**9, "do not fit num_res_blocks of the configuration"),
        ("rope_parameters", "x", "rope_parameters"),
        ("hidden_act", "x", "No model can be made of the configuration .*x"),
    ],
)
def test_config_names_the_field(
    field: str, value: Any, reason: str, published: Path, tmp_path: Path
) -> None:
    folder = changed(published, tmp_path / "c", "config.json", field, value)
    with pytest.raises(UserError, match=reason) as raised:
        open_checkpoint(folder).decoder()
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value"), [("num_res_blocks", 10**5), ("base_channels", 3200), ("resolution", 4096)]
)
def test_config_agrees_with_the_vqgan_beside_it(field: str, value: int, tmp_path: Path) -> None:
    write_hugging_face(tmp_path / "hf", open_checkpoint(INPUT))
    folder = changed(tmp_path / "hf", tmp_path / "c", "config.json", f"vq_config.{field}", value)
    with pytest.raises(UserError, match=f"config.json: .*vq_config.{field}"):
        open_checkpoint(folder).decoder()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    malformed_files.KINDS["adapter_config.json"].make(folder)
    return folder


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("rank_pattern", {"q_proj": 10**9}, "rank_pattern"),
        ("r", 10**30, "Unsupported r"),
        ("task_type", "x", "PEFT cannot apply this adapter"),
        ("alpha_pattern", "x", "Unsupported alpha_pattern"),
        ("exclude_modules", 1.5, "PEFT cannot apply this adapter"),
        ("layer_replication", [[0, 10**9]], "PEFT cannot apply this adapter"),
    ],
)
def test_adapters_name_the_field(
    field: str, value: Any, reason: str, adapter: Path, tmp_path: Path
) -> None:
    folder = changed(adapter, tmp_path / "c", "adapter_config.json", field, value)
    with pytest.raises(UserError, match=reason) as raised:
        load_adapter(open_checkpoint(INPUT).decoder(), folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("name", [["x"], 3, {}, "a\0b"])
def test_the_base_of_an_adapter_is_a_name(name: Any, adapter: Path, tmp_path: Path) -> None:
    folder = changed(
        adapter, tmp_path / "c", "adapter_config.json", "base_model_name_or_path", name
    )
    with pytest.raises(UserError, match=r"adapter_config.json: Invalid base_model_name_or_path"):
        medley.load(folder)


def test_a_tokenizer_with_ids_beyond_the_model_is_refused(tmp_path: Path) -> None:
    file = "tokenizer/text_tokenizer.json"
    folder = changed(INPUT, tmp_path / "c", file, "model.vocab.another", 10**6)
    with pytest.raises(UserError, match=r"text_tokenizer.json: A token id does not exist in the"):
        medley.load(folder, device="cpu")


# --- weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.zeros(1).expand(10**6, 10**6), "4 bytes for"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.zeros(3, device="meta"), "on meta"),
        (3, "an object of type int"),
        (None, "an object of type NoneType"),
    ],
)
def test_pickles_hold_dense_tensors_of_their_own_size(
    value: Any, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.pth"
    torch.save({"w": value}, path)
    with pytest.raises(UserError, match=f"a.pth: Invalid weight 'w' .*{reason}"):
        load_tensors(path)


@pytest.mark.parametrize(
    "table",
    [None, [], {}, {"a": 3}, {"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": ""}],
)
def test_an_index_names_files_beside_it(table: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(UserError, match=r"index.json: Invalid (weight_map|file of a)"):
        ShardedTensors(tmp_path)


# --- Arrow ------------------------------------------------------------------------------------

_COUNT = 12345  # rows; no other number in the files has this value
_COLUMNS: dict[str, Callable[[], pa.Array]] = {
    "nulls": lambda: pa.nulls(_COUNT),
    "numbers": lambda: pa.array(range(_COUNT)),
    "texts": lambda: pa.array(["a"] * _COUNT),
    "dictionary": lambda: pa.array(["a"] * _COUNT).dictionary_encode(),
    "struct of nulls": lambda: pa.StructArray.from_arrays([pa.nulls(_COUNT)], ["x"]),
    "fixed lists of nulls": lambda: pa.FixedSizeListArray.from_arrays(pa.nulls(_COUNT), 1),
    "lists": lambda: pa.array([[1]] * _COUNT),
}


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream], ids=["file", "stream"])
@pytest.mark.parametrize("false", [2**40, 2**63 - 1, -5])
@pytest.mark.parametrize("column", _COLUMNS)
def test_arrow_with_false_numbers_of_rows_is_refused(
    column: str, false: int, new: Any, tmp_path: Path
) -> None:
    path = write_arrow(tmp_path, _COLUMNS[column](), new)
    assert replace_number(path, _COUNT, false)
    with pytest.raises(UserError, match=r"a.arrow: The file claims more values"):
        sum(1 for _ in records_of(path))


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream], ids=["file", "stream"])
@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("false", [2**40, 2**63 - 1, -5, 7])
def test_arrow_with_false_sizes_of_compressed_buffers_is_refused(
    false: int, compression: str, new: Any, tmp_path: Path
) -> None:
    path = write_arrow(tmp_path, _COLUMNS["numbers"](), new, compression)
    assert replace_number(path, 8 * _COUNT, false)
    with pytest.raises(UserError, match=r"a.arrow: (A batch may expand|The file is not an Arrow)"):
        sum(1 for _ in records_of(path))


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream], ids=["file", "stream"])
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("column", _COLUMNS)
def test_intact_arrow_is_read_in_full(
    column: str, compression: str | None, new: Any, tmp_path: Path
) -> None:
    values = _COLUMNS[column]()
    path = write_arrow(tmp_path, values, new, compression)
    assert [record["a"] for _, _, record in records_of(path)] == values.to_pylist()


def test_a_truncated_arrow_file_is_refused(tmp_path: Path) -> None:
    path = write_arrow(tmp_path, _COLUMNS["numbers"](), pa.ipc.new_file)
    data = path.read_bytes()
    for end in (len(data) - 1, len(data) // 2, 8, 7):
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match="not an Arrow file"):
            list(records_of(path))


def write_arrow(folder: Path, values: pa.Array, new: Any, compression: str | None = None) -> Path:
    table = pa.table([values], names=["a"])
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(str(folder / "a.arrow"), table.schema, options=options) as writer:
        writer.write_table(table)
    return folder / "a.arrow"


def replace_number(path: Path, old: int, new: int) -> int:
    """Replaces a 64-bit number everywhere in a file; returns the number of places."""
    data, before, after = path.read_bytes(), struct.pack("<q", old), struct.pack("<q", new)
    path.write_bytes(data.replace(before, after))
    return data.count(before)
