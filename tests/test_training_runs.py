"""Training runs at toy size: log, samples, errors, recipes, and the saved adapter."""

from __future__ import annotations

import csv
import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from training import train
from training_runs import (
    first_text_token,
    logged_values,
    random_document,
    tiny,
    tiny_vocabulary,
    train_flags,
)

from medley.checkpoints.adapter import load_adapter, merged_tensors, read_adapter
from medley.data.packing import IGNORE_INDEX, build_sequence
from medley.data.token_dataset import TokenDataset, write_token_jsonl
from medley.utils.manifest import write_manifest
from medley.vqgan import VQGAN, VQGANConfig

pytestmark = pytest.mark.slow
RECIPES = sorted(path.stem for path in (ROOT / "src" / "medley" / "recipes").glob("*.yaml"))


@dataclass(frozen=True)
class LoggedRun:
    """A finished run: its folder, what it printed, its log, and how many VQGANs it built."""

    folder: Path
    printed: str
    log: list[dict[str, Any]]
    vqgans_built: int


@pytest.fixture(scope="module")
def logged_run(training_data: Path, tmp_path_factory: pytest.TempPathFactory) -> LoggedRun:
    """A run with validation by task, samples, and several checkpoints of which one is kept."""
    folder = tmp_path_factory.mktemp("logged")
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"text": "Show me a CT scan."}\n')
    flags = ["--val_data", training_data / "val.jsonl", "--pack", "--max_length", 256]
    flags += ["--epoch", 1, "--bs", 2, "--eval_steps", 3, "--save_strategy", "steps"]
    flags += ["--save_steps", 2, "--sample_prompts", prompts]
    flags += ["--trainer", '{"save_total_limit": 1}']
    built = []
    init = VQGAN.__init__

    def counting_init(self: VQGAN, config: VQGANConfig) -> None:
        built.append(config)
        init(self, config)

    output = folder / "run"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(VQGAN, "__init__", counting_init)
        assert train.main(train_flags(training_data, output, *flags)) == 0
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return LoggedRun(output, printed.getvalue(), log, len(built))


def test_run_prints_a_summary_with_the_first_sequence(logged_run: LoggedRun) -> None:
    for text in ("parameters are trained", "memory: about", "disk: about", "time:", "\u27e6"):
        assert text in logged_run.printed


def test_run_builds_the_vqgan_once(logged_run: LoggedRun) -> None:
    """Data checks, decoder, samples and manifest all use the checkpoint's one VQGAN."""
    assert logged_run.vqgans_built == 1


def test_log_counts_each_labeled_token_once(training_data: Path, logged_run: LoggedRun) -> None:
    steps = [entry for entry in logged_run.log if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 and entry["mfu"] > 0 for entry in steps)
    labels = sum(
        int((build_sequence([ids], tiny_vocabulary())["labels"] != IGNORE_INDEX).sum())
        for ids in TokenDataset(training_data / "train.jsonl")
    )
    assert steps[-1]["text_tokens"] + steps[-1]["image_tokens"] == labels
    with open(logged_run.folder / "log.csv", encoding="utf-8", newline="") as file:
        assert sum(bool(row["loss"]) for row in csv.DictReader(file)) == len(steps)
    with Image.open(logged_run.folder / "loss.png") as image:
        assert image.width > 500


def test_validation_loss_is_the_mean_over_the_tokens_of_all_tasks(logged_run: LoggedRun) -> None:
    names = ("task0", "task1")
    entries = [e for e in logged_run.log if e["step"] == 3 and any("eval" in name for name in e)]
    tasks = [next(e for e in entries if f"eval_{name}_loss" in e) for name in names]
    total = next(e for e in entries if "eval_loss" in e)
    tokens = [e[f"eval_{name}_trained_tokens"] for e, name in zip(tasks, names, strict=True)]
    losses = [e[f"eval_{name}_loss"] for e, name in zip(tasks, names, strict=True)]
    weighted = sum(loss * count for loss, count in zip(losses, tokens, strict=True))
    assert total["eval_loss"] == pytest.approx(weighted / sum(tokens))


def test_run_keeps_the_last_checkpoint_and_writes_samples(logged_run: LoggedRun) -> None:
    assert len(list(logged_run.folder.glob("checkpoint-*"))) == 1
    assert list((logged_run.folder / "samples").glob("step-3/*.png"))


def test_nonfinite_loss_stops_the_run_and_names_the_documents(
    training_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--lr", "1e30", "--warmup_ratio", 0, "--lr_scheduler", "constant", "--bs", 2]
    flags += ["--trainer", '{"max_grad_norm": 0}']
    assert train.main(train_flags(training_data, tmp_path / "run", *flags)) == 2
    error = capsys.readouterr().err
    assert "The training loss is nan at step" in error
    assert f"{training_data / 'train.jsonl'} document " in error


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_adapter_trains_over_a_quantized_base(
    training_data: Path, tmp_path: Path, kind: str
) -> None:
    flags = train_flags(training_data, tmp_path, "--quantize", kind, "--steps", 3, "--bs", 4)
    assert train.main(flags) == 0
    _, tensors = read_adapter(tmp_path)
    assert all("lora_" in name for name in tensors)
    assert len(logged_values(tmp_path)) == 3


def test_second_stage_continues_the_adapter_of_the_first(
    training_data: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train.main(train_flags(training_data, first, "--steps", 4, "--bs", 4)) == 0
    flags = ["--steps", 1, "--bs", 4, "--adapter", first, "--warmup_ratio", 0]
    assert train.main(train_flags(training_data, second, *flags)) == 0
    assert logged_values(second)[0] < logged_values(first)[0]
    names = [load_file(f / "adapter_model.safetensors").keys() for f in (first, second)]
    assert names[0] == names[1]


def test_merged_adapter_gives_the_logits_of_the_trained_model(
    training_data: Path, tmp_path: Path
) -> None:
    flags = ["--steps", 3, "--bs", 4, "--trainable", "lora+image_head", "--train_on", "all"]
    assert train.main(train_flags(training_data, tmp_path, *flags)) == 0
    ids = torch.from_numpy(TokenDataset(training_data / "val.jsonl")[0])[None]
    trained = load_adapter(tiny().decoder(torch.float32), tmp_path)
    merged = tiny().decoder(torch.float32)
    state = {name: tensor.float() for name, tensor in merged_tensors(tiny(), tmp_path)}
    merged.load_state_dict(state, strict=False)
    with torch.inference_mode():
        expected, found = trained(ids).logits, merged(ids).logits
    # The merge rounds the weights to bfloat16, which has eight bits of precision.
    assert (expected - found).abs().max() < 2**-7 * expected.abs().max()


def test_losses_of_the_demo_recipe_are_the_recorded_ones(
    training_data: Path, tmp_path: Path
) -> None:
    """Recorded on x86 with torch 2.13; other kernels round otherwise."""
    flags = ["--config", "demo", "--ds", "null", "--steps", 6, "--save_strategy", "no"]
    assert train.main(train_flags(training_data, tmp_path, *flags)) == 0
    recorded = json.loads((ROOT / "tests" / "recorded_losses.json").read_text())
    assert logged_values(tmp_path) == pytest.approx(recorded, rel=5e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_at_toy_size(training_data: Path, tmp_path: Path, recipe: str) -> None:
    max_length = min(384, tiny().config().max_position_embeddings)
    flags = ["--config", recipe, "--ds", "null", "--bs", 2, "--grad_acc", 1, "--global_bs", 2]
    flags += ["--steps", 1, "--warmup_ratio", 0, "--max_length", max_length]
    assert train.main(train_flags(training_data, tmp_path, *flags)) == 0
    assert (tmp_path / "manifest.json").exists()


def test_batches_without_labels_are_allowed(tmp_path: Path) -> None:
    """Blank sequences, and text documents when only images are trained on."""
    generator = np.random.default_rng(0)
    vocabulary = tiny_vocabulary()
    rows = [random_document(generator, 9, "a") for _ in range(3)]
    text = range(first_text_token(), first_text_token() + 8)
    rows[1]["tokens"] = [vocabulary.bos, *text, vocabulary.eos]
    data = tmp_path / "train.jsonl"
    write_token_jsonl(data, iter(rows))
    write_manifest(data, {}, [], tiny().fingerprint())
    flags = ["--val_data", data, "--train_on", "images", "--trainable", "image_head"]
    flags += ["--grad_acc", 2, "--warmup_ratio", 0, "--epoch", 2]
    assert train.main(train_flags(tmp_path, tmp_path / "images", *flags)) == 0
    assert len(logged_values(tmp_path / "images", "eval_a_loss")) == 1


def test_medmax_labels_train(training_data: Path, tmp_path: Path) -> None:
    flags = ["--compat", "medmax", "--bs", 5, "--warmup_ratio", 0]
    assert train.main(train_flags(training_data, tmp_path, *flags)) == 0
    assert len(logged_values(tmp_path)) == 5


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_samples_are_generated_in_half_precision_without_deepspeed(
    training_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainable: str
) -> None:
    """With trained weights in float32, and with the norms in float32 of CUDA's autocast."""
    layer_norm = torch.nn.functional.layer_norm

    def layer_norm_of_cuda(states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return layer_norm(states.float(), *args, **kwargs)

    if trainable == "lora":
        monkeypatch.setattr(torch.nn.functional, "layer_norm", layer_norm_of_cuda)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "Show me a CT scan."}\n')
    output = tmp_path / "run"
    flags = ["--trainable", trainable, "--bf16", "--steps", 1, "--bs", 2, "--eval_steps", 1]
    flags += ["--val_data", training_data / "val.jsonl", "--sample_prompts", prompts]
    assert train.main(train_flags(training_data, output, *flags)) == 0
    assert list((output / "samples").glob("step-1/*.png"))
