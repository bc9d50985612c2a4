"""Writing checkpoints: shards, norms, full disks."""

from __future__ import annotations

import errno
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

from medley.checkpoints import conversion
from medley.checkpoints import huggingface as huggingface_layout
from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import (
    max_abs_diff,
    write_chameleon,
    write_hugging_face,
)
from medley.checkpoints.logits import logit_difference
from medley.checkpoints.safetensors_writer import SafetensorsWriter
from medley.checkpoints.torch_writer import TorchWriter
from medley.errors import UserError
from medley.utils.files import read_json, write_json


def test_safetensors_reads_a_streamed_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {
        "a": torch.randn(3, 4), "empty": torch.zeros(0, 2), "scalar": torch.tensor(3.5),
        "half": torch.randn(5).bfloat16(), "view": torch.randn(4, 4).t()[1:],
        "flag": torch.ones(2, dtype=torch.bool), "numbers": torch.arange(5),
    }  # fmt: skip
    file = SafetensorsWriter(tmp_path / "x.safetensors")
    for name, tensor in state.items():
        file.add(name, tensor)
    file.close()
    found = load_file(tmp_path / "x.safetensors")
    assert file.names == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_torch_reads_a_streamed_pth(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {
        "a": torch.randn(3, 4), "half": torch.randn(500, 30).bfloat16(), "empty": torch.zeros(0, 2),
        "view": torch.randn(4, 4).t()[1:], "scalar": torch.tensor(3.5), "ids": torch.arange(5),
    }  # fmt: skip
    file = TorchWriter(tmp_path / "x.pth", {n: t.to("meta") for n, t in state.items()})
    for name in reversed(state):
        file.put(name, state[name])
    file.close()
    for mapped in (False, True):
        found = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mapped)
        assert list(found) == list(state)
        for name, tensor in state.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    assert zipfile.ZipFile(tmp_path / "x.pth").testzip() is None  # all checksums are correct


def test_missing_and_unexpected_files_and_tensors_are_named(tmp_path: Path) -> None:
    write_chameleon(tmp_path / "pth", open_checkpoint("tiny"), "tiny")
    model = tmp_path / "pth" / "models" / "tiny"
    shutil.copy(model / "consolidated.pth", model / "consolidated.00.pth")
    with pytest.raises(UserError, match=r"consolidated\.pth and 1 numbered .*Move the other away"):
        open_checkpoint(tmp_path / "pth").decoder()
    write_hugging_face(tmp_path / "hf", open_checkpoint("tiny"))
    state = load_file(tmp_path / "hf" / "model.safetensors")
    state.pop("lm_head.weight")
    save_file(state, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match=r"Tensors are missing: lm_head\.weight\. Copy all files"):
        open_checkpoint(tmp_path / "hf").decoder()
    index = {"weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    write_json(tmp_path / "hf" / "model.safetensors.index.json", index)
    for name in ("model-00001-of-00001.safetensors", "model-00002-of-00003.safetensors"):
        shutil.copy(tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / name)
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors not listed in"):
        open_checkpoint(tmp_path / "hf").decoder()


def test_many_small_shards_load_in_stock_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_layout, "SHARD_BYTES", 1 << 20)
    write_hugging_face(tmp_path / "hf", open_checkpoint("tiny"))
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(shards) > 5
    _, info = transformers.ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert max_abs_diff(open_checkpoint("tiny"), open_checkpoint(tmp_path / "hf")) == 0


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shard_counts_that_divide_the_heads(layout: Path, tmp_path: Path, shards: int) -> None:
    source = open_checkpoint(layout / "input")
    config = source.config()
    write_hugging_face(tmp_path / "hf", source)
    trained = open_checkpoint(tmp_path / "hf")
    size = source.model_folder.name

    def write(norms: Any) -> Any:
        write_chameleon(tmp_path / "new", trained, size, source, shards, norms)
        return open_checkpoint(tmp_path / "new")

    if config.num_key_value_heads % shards or config.num_attention_heads % shards:
        with pytest.raises(UserError, match="cannot be split over"):
            write("equal")
    elif shards < config.model_parallel_size:  # the norms of the original shards differ
        with pytest.raises(UserError, match=r"norms of the heads of shard 0 differ .*--norms mean"):
            write("equal")
        assert max_abs_diff(trained, write("mean")) > 0
    else:
        new = write("equal")
        assert len(list(new.model_folder.glob("consolidated*.pth"))) == shards
        assert read_json(new.model_folder / "params.json")["model_parallel_size"] == shards
        assert max_abs_diff(trained, new) == 0
        assert logit_difference(trained, new).largest < 1e-5


def test_missing_disk_space_is_reported_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = open_checkpoint("tiny")
    assert tiny.weight_bytes() > 10_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000))  # type: ignore[attr-defined]
    for write in (write_hugging_face, lambda t, s: write_chameleon(t, s, "tiny")):
        with pytest.raises(UserError, match=r"needs 0\.02 GB, 0\.00 GB are free"):
            write(tmp_path / "out", tiny)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout_name", ["huggingface", "chameleon"])
def test_a_full_disk_leaves_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout_name: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if layout_name == "huggingface":
        monkeypatch.setattr(SafetensorsWriter, "close", full)
        with pytest.raises(UserError, match=r"out: .*[Dd]isk"):
            write_hugging_face(tmp_path / "out", open_checkpoint("tiny"))
    else:
        monkeypatch.setattr(conversion, "copy_tokenizer", full)
        with pytest.raises(UserError, match=r"out: .*[Dd]isk"):
            write_chameleon(tmp_path / "out", open_checkpoint("tiny"), "tiny")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shards", [1, 2])
def test_output_has_everything_that_chameleons_loader_reads(tmp_path: Path, shards: int) -> None:
    """Names, shapes and files, as the loader of facebookresearch/chameleon requires them."""
    source = open_checkpoint(GOLDEN / "checkpoints" / "chameleon_7b_layout" / "input")
    write_chameleon(tmp_path / "new", source, "7b", None, shards)
    folder = tmp_path / "new" / "models" / "7b"
    numbered = [f"consolidated.{i:02d}.pth" for i in range(shards)]
    files = ["consolidated.pth"] if shards == 1 else numbered
    others = {"params.json", "consolidate_params.json", "checklist.chk"}
    assert {p.name for p in folder.iterdir()} == {*files, *others}
    model = read_json(folder / "params.json")["model"]
    width, heads = model["dim"], model["n_heads"]
    groups = model["n_kv_heads"] or heads
    head = width // heads
    for file in files:
        state = torch.load(folder / file, weights_only=True)
        feed = state["layers.0.feed_forward.w1.weight"].shape[0]
        own, own_groups = heads // shards * head, groups // shards * head
        layer = {
            "attention.wq.weight": (own, width), "attention.wk.weight": (own_groups, width),
            "attention.wv.weight": (own_groups, width), "attention.wo.weight": (width, own),
            "attention.q_normalization.weight": (head,), "attention.q_normalization.bias": (head,),
            "attention.k_normalization.weight": (head,), "attention.k_normalization.bias": (head,),
            "feed_forward.w1.weight": (feed, width), "feed_forward.w3.weight": (feed, width),
            "feed_forward.w2.weight": (width, feed),
            "attention_norm.weight": (width,), "ffn_norm.weight": (width,),
        }  # fmt: skip
        vocabulary_size = model["vocab_size"]
        expected = {
            "tok_embeddings.weight": (vocabulary_size, width // shards), "norm.weight": (width,),
            "output.weight": (vocabulary_size // shards, width), "rope.freqs": (head // 2,),
            **{f"layers.{i}.{n}": s for i in range(model["n_layers"]) for n, s in layer.items()},
        }  # fmt: skip
        assert {n: tuple(t.shape) for n, t in state.items()} == expected
        kinds = {t.dtype for n, t in state.items() if n != "rope.freqs"}
        assert kinds == {source.dtype()}
        assert state["rope.freqs"].dtype == torch.float32
