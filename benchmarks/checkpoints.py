"""Time and memory of merging and converting checkpoints, compared with PEFT.

    python benchmarks/checkpoints.py

A bfloat16 decoder of 340 million random parameters in shards of 200 MB, and LoRA of rank 16 on all
seven projections. Baseline: from_pretrained, PeftModel, merge_and_unload and save_pretrained.
Medley's merge_lora, pth_to_bin and bin_to_pth run with 1 and 4 times the layers; their memory must
not grow with the number of layers. Memory is counted beyond a process's imports: anonymous pages,
and separately the pages of mapped files, which the kernel can drop.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor

from medley.checkpoints import huggingface
from medley.checkpoints.chameleon import copy_tokenizer
from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import write_chameleon
from medley.modeling.chameleon import ChameleonForConditionalGeneration
from medley.trainer.parameters import PROJECTIONS
from medley.utils.cli_options import run_program
from medley.utils.files import read_json
from medley.utils.tensor_files import ShardedTensors
from medley.vqgan.files import hugging_face_tensors

ROOT = Path(__file__).resolve().parents[1]
RANK = 16
# Runs code and prints its seconds and its memory beyond the imports.
MEASURE = """
import pathlib, re, sys, threading, time
import peft, torch, transformers
import conversion.bin_to_pth, conversion.merge_lora, conversion.pth_to_bin
from medley.checkpoints.checkpoint import open_checkpoint

def status():
    text = pathlib.Path("/proc/self/status").read_text()
    return [int(re.search(n + r":\\s+(\\d+)", text)[1]) for n in ("RssAnon", "VmRSS")]
before, peak = status(), status()
def watch():
    while True:
        peak[:] = map(max, peak, status())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
exec(sys.argv[1])
seconds = time.perf_counter() - start
print("\\nresult", seconds, *((p - b) / 1024 for p, b in zip(peak, before)))
"""
PEFT = """
model = transformers.ChameleonForConditionalGeneration.from_pretrained({base!r}, dtype="bfloat16")
model = peft.PeftModel.from_pretrained(model, {adapter!r}).merge_and_unload()
model.save_pretrained({output!r}, max_shard_size="200MB")
"""
OURS = """
conversion.merge_lora.main(
    ["--ckpt_path", {adapter!r}, "--base_path", {base!r}, "--output_dir", {output!r}])
"""
PTH_TO_BIN = """
conversion.pth_to_bin.main(["--input_dir", {base!r}, "--output_dir", {output!r}])
"""
BIN_TO_PTH = """
conversion.bin_to_pth.main(
    ["--trained_ckpt", {base!r}, "--original_ckpt", {original!r}, "--new_ckpt", {output!r}])
"""


@dataclass(frozen=True)
class Options:
    """Measures merging and converting.

    Args:
        layers: layers of the smaller model; the larger one has 4 times as many
        width: hidden size
        vocabulary: vocabulary size
    """

    layers: int = 16
    width: int = 1024
    vocabulary: int = 65536


def main(argv: list[str] | None = None) -> int:
    return run_program("benchmarks/checkpoints.py", Options, work, argv)


def work(options: Options) -> None:
    huggingface.SHARD_BYTES = 200_000_000
    result: dict[str, Any] = {"benchmark": "checkpoints"}
    with tempfile.TemporaryDirectory() as name:
        for times in (1, 4):
            folder = Path(name) / str(times)
            parameters = make_model(options, options.layers * times, folder / "base")
            make_adapter(options, options.layers * times, folder)
            source = open_checkpoint(folder / "base")
            write_chameleon(folder / "pth", source, "random")
            print(f"{parameters / 1e6:.0f} million parameters", flush=True)
            runs = {"merge": (OURS, "base"), "pth_to_bin": (PTH_TO_BIN, "pth")}
            runs["bin_to_pth"] = (BIN_TO_PTH, "merge")
            if times == 1:
                runs = {"peft": (PEFT, "base"), **runs}
            for kind, (code, base) in runs.items():
                values = measure(code, folder, base, kind)
                result[f"{kind}_{times}x_layers"] = values
                print(kind, values, flush=True)
            result[f"parameters_{times}x_layers"] = parameters
            result[f"same_as_peft_{times}x"] = None if times > 1 else compare_with_peft(folder)
    peft_values, merge_values = result["peft_1x_layers"], result["merge_1x_layers"]
    result["time_of_peft"] = merge_values["seconds"] / peft_values["seconds"]
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps(result))


def make_model(options: Options, layers: int, folder: Path) -> int:
    """Writes random weights in Hugging Face's layout; returns the number of parameters."""
    tiny = open_checkpoint("tiny")
    config = tiny.config()
    config.hidden_size, config.num_hidden_layers = options.width, layers
    config.num_attention_heads = config.num_key_value_heads = options.width // 128
    config.intermediate_size = options.width * 11 // 4
    config.vocab_size = options.vocabulary
    config.head_dim = 128
    with torch.device("meta"):
        shapes = {
            n: tuple(t.shape)
            for n, t in ChameleonForConditionalGeneration(config).state_dict().items()
            if ".vqmodel." not in n
        }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            is_norm = "norm" in name
            yield name, (torch.ones(shape) if is_norm else torch.randn(shape) * 0.02).bfloat16()
        yield from hugging_face_tensors(tiny.vqgan()[0]).items()

    folder.mkdir(parents=True)
    huggingface.write_weights(folder, tensors())
    huggingface.write_config(folder, config, torch.bfloat16)
    sizes = tiny.vqgan()[0].config
    parsed = read_json(tiny.tokenizer_file)
    huggingface.write_processor(folder, parsed, sizes.codes_per_image, sizes.resolution)
    copy_tokenizer(tiny.tokenizer_folder, folder / "tokenizer")
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def make_adapter(options: Options, layers: int, folder: Path) -> None:
    width, feed_forward = options.width, options.width * 11 // 4
    state: dict[str, Tensor] = {}
    for layer in range(layers):
        for name in PROJECTIONS:
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            key = f"base_model.model.model.layers.{layer}.{part}.{name}"
            inputs = feed_forward if name == "down_proj" else width
            outputs = feed_forward if name in ("gate_proj", "up_proj") else width
            state[f"{key}.lora_A.weight"] = torch.randn(RANK, inputs) * 0.02
            state[f"{key}.lora_B.weight"] = torch.randn(outputs, RANK) * 0.02
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM",
        base_model_name_or_path=str(folder / "base"), inference_mode=True,
    )  # fmt: skip
    config.save_pretrained(folder / "adapter")
    save_file(state, folder / "adapter" / "adapter_model.safetensors")


def measure(code: str, folder: Path, base: str, kind: str) -> dict[str, float]:
    paths = {"base": base, "adapter": "adapter", "output": kind, "original": "pth"}
    command = code.format(**{name: str(folder / value) for name, value in paths.items()})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, command], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    seconds, anonymous, total = map(float, done.stdout.split("result")[1].split())
    return {"seconds": seconds, "anonymous_mb": anonymous, "with_mapped_files_mb": total}


def compare_with_peft(folder: Path) -> dict[str, float]:
    """The largest difference from PEFT's merge, and the fraction of equal values."""
    reference = dict(ShardedTensors(folder / "peft").tensors())
    largest, equal, count = 0.0, 0, 0
    for name, tensor in ShardedTensors(folder / "merge").tensors():
        if ".vqmodel." in name:  # Medley keeps float32; from_pretrained rounds it
            continue
        difference = (tensor.float() - reference[name].float()).abs()
        largest = max(largest, float(difference.max()))
        equal += int((difference == 0).sum())
        count += tensor.numel()
    return {"largest_difference": largest, "share_equal": equal / count}


if __name__ == "__main__":
    sys.exit(main())
