"""`tiny` in other layouts, for benchmarks/tiny_skill.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig
from phantom_questions import Model, run
from safetensors.torch import load_file, save_file

RANK = 8  # of the adapter that is split off the model
SEED = 40_000_000


def make_layouts(ckpt: str, folder: Path) -> Iterator[Model]:
    """The same model in Hugging Face's layout, and as a base with an adapter.

    The adapter's product is subtracted from the base first. The base alone is the baseline of the
    latter.
    """
    complete, base, adapter = folder / "hf", folder / "base", folder / "adapter"
    run("medley", "to-hf", "--input_dir", ckpt, "--output_dir", complete)
    yield Model("hf", str(complete))
    shutil.copytree(complete, base)
    tensors = load_file(complete / "model.safetensors")
    torch.manual_seed(SEED)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        tensors[name] = tensor.float()
        if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")):
            up, down = (torch.randn(tensor.shape[0], RANK), torch.randn(RANK, tensor.shape[1]))
            up *= tensors[name].norm() / (up @ down).norm()
            tensors[name] = tensors[name] - up @ down
            own = f"base_model.model.{name.removesuffix('.weight')}"
            weights |= {f"{own}.lora_A.weight": down, f"{own}.lora_B.weight": up}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config))
    adapter.mkdir()
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj", "down_proj"],
        base_model_name_or_path=str(base), task_type="CAUSAL_LM",
    ).save_pretrained(adapter)  # fmt: skip
    yield Model("adapter", str(base), adapter)
    yield Model("base_without_adapter", str(base))
