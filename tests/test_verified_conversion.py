"""What `--verify` judges when adapters are merged and layouts converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import medley.commands.merge as merge_command
from medley.checkpoints.checkpoint import Checkpoint, open_checkpoint
from medley.checkpoints.conversion import write_hugging_face
from medley.commands.merge import MergeOptions, merge
from medley.commands.to_pth import ToPthOptions, to_pth
from medley.errors import UserError
from medley.utils.files import partial_hash

LAYOUT = Path(__file__).parent / "golden" / "checkpoints" / "chameleon_7b_layout" / "input"


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return open_checkpoint(LAYOUT)


@pytest.fixture
def adapter(base: Checkpoint, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base.decoder(torch.float32), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.randn(weight.shape) * 0.05)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("factor", [1.02, 2.0, float("nan")])
def test_a_merge_that_changes_the_model_leaves_nothing(
    factor: float, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = merge_command.merged_tensors

    def wrong(base: Checkpoint, folder: Path) -> Any:
        for name, tensor in right(base, folder):
            yield name, tensor * factor if name.endswith("1.mlp.down_proj.weight") else tensor

    monkeypatch.setattr(merge_command, "merged_tensors", wrong)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="logits differ from those of base and adapter"):
        merge(MergeOptions(adapter, tmp_path / "merged", str(LAYOUT), verify=True))
    assert sorted(tmp_path.iterdir()) == before


def test_a_right_merge_is_verified(adapter: Path, tmp_path: Path) -> None:
    merge(MergeOptions(adapter, tmp_path / "merged", str(LAYOUT), verify=True))
    merged = dict(open_checkpoint(tmp_path / "merged").tensors())
    changed = [n for n, tensor in open_checkpoint(LAYOUT).tensors() if (merged[n] != tensor).any()]
    assert len(changed) == 4  # two modules in each of two layers


def test_provenance_of_an_adapter_in_a_pickle(adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    weights = adapter / "adapter_model.bin"
    torch.save(tensors, weights)
    merge(MergeOptions(adapter, tmp_path / "merged", str(LAYOUT), verify=True))
    manifest = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    assert manifest["inputs"] == {str(weights): partial_hash(weights)}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rope_type", {"rope_type": "linear", "factor": 2.0}),
        ("rope_type", {"rope_type": "dynamic", "factor": 4.0}),
        ("partial_rotary_factor", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
    ],
)
def test_what_params_json_cannot_hold_is_refused_by_name(
    option: str, value: Any, base: Checkpoint, tmp_path: Path
) -> None:
    write_hugging_face(tmp_path / "hf", base)
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    if isinstance(value, dict):
        config["rope_parameters"] = {**config["rope_parameters"], **value}
    else:
        config[option] = value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"layout cannot hold {option} "):
        to_pth(ToPthOptions(tmp_path / "hf", str(LAYOUT), tmp_path / "pth"))
    assert not (tmp_path / "pth").exists()


def unequal_norms(base: Checkpoint, folder: Path) -> Path:
    """A checkpoint in Hugging Face's layout whose heads have different norms."""

    def tensors() -> Any:
        for name, tensor in base.tensors():
            if name.endswith("layers.1.self_attn.q_norm.weight"):
                tensor = tensor.clone()
                tensor[0] += 1
            yield name, tensor

    write_hugging_face(folder, base, tensors())
    return folder


def test_mean_norms_are_reported_by_verify(
    base: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = unequal_norms(base, tmp_path / "hf")
    with pytest.raises(UserError, match="--norms mean"):
        to_pth(ToPthOptions(trained, str(LAYOUT), tmp_path / "equal", verify=True))
    to_pth(ToPthOptions(trained, str(LAYOUT), tmp_path / "pth", norms="mean", verify=True))
    printed = capsys.readouterr().out
    assert "largest tensor difference: 0.75" in printed
    norms = dict(open_checkpoint(tmp_path / "pth").tensors())
    name = "model.layers.1.self_attn.q_norm.weight"
    mean = dict(open_checkpoint(trained).tensors())[name].float().mean(0)
    assert torch.allclose(norms[name].float(), mean.expand_as(norms[name]), atol=0.01)
    assert not (tmp_path / "equal").exists()
