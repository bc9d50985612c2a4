"""Training: rows, losses, what is saved, told and refused, and going on after a kill."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from training import train
from training_runs import MARKS, TINY, document, losses, words

from medley import attention
from medley.checkpoints.adapter import load_adapter, merged_tensors, read_adapter
from medley.data.packing import IGNORE_INDEX, SequenceTooLong, build_sequence, collate
from medley.data.token_dataset import TokenDataset, write_jsonl
from medley.errors import UserError
from medley.modeling.attention import sequence_lengths, set_attention
from medley.modeling.chunked_loss import ChunkedCrossEntropy
from medley.trainer import preflight
from medley.trainer.callbacks import GradientCheckCallback
from medley.trainer.data import PackedDataset, PackingConfig, WeightedSource, by_task
from medley.trainer.options import TrainOptions
from medley.trainer.preflight import TrainingMemoryEstimate
from medley.utils.manifest import write_manifest

# --- rows -----------------------------------------------------------------------------------


def test_weights_take_files_more_than_once_or_in_part(training_data: Path) -> None:
    assert WeightedSource.parse("a.jsonl:0.5") == WeightedSource(Path("a.jsonl"), 0.5)
    assert WeightedSource.parse("a:b.jsonl") == WeightedSource(Path("a:b.jsonl"))
    with pytest.raises(UserError, match=r"weight is 0, expected above 0"):
        WeightedSource.parse("a.jsonl:0")
    one, other = (
        TokenDataset(training_data / "train.jsonl"),
        TokenDataset(training_data / "val.jsonl"),
    )
    rows = PackedDataset([(one, 0.5), (other, 2.5)], MARKS, PackingConfig(400, seed=3))
    counts = np.bincount(rows.documents[:, 0])
    assert counts.tolist() == [12, 15]
    assert {3, 2} == set(np.bincount(rows.documents[rows.documents[:, 0] == 1, 1]).tolist())
    few = PackedDataset([(one, 1.0)], MARKS, PackingConfig(400, seed=3, max_samples=5))
    assert len(few) == 5
    assert [t.tolist() for t in few.documents] == sorted(t.tolist() for t in few.documents)


def test_rows_are_padded_with_blanks_to_whole_steps_and_name_their_documents(
    training_data: Path,
) -> None:
    shards = TokenDataset(training_data / "train.jsonl")
    rows = PackedDataset([(shards, 1.0)], MARKS, PackingConfig(400, pack=True), pad_to=5)
    assert len(rows) % 5 == 0
    assert len(rows) > len(rows.rows)
    blank = rows[len(rows) - 1]
    assert (blank["labels"] == IGNORE_INDEX).all()
    assert rows.names(len(rows) - 1) == []
    names = [name for i in range(len(rows)) for name in rows.names(i)]
    assert sorted(names) == sorted(f"{shards.path} document {i}" for i in range(24))
    batch = rows.collate([rows[0], blank])
    assert batch["row_numbers"].tolist() == [0, len(rows) - 1]
    with pytest.raises(SequenceTooLong, match="--max_length is 70"):
        PackedDataset([(shards, 1.0)], MARKS, PackingConfig(70))


def test_validation_is_split_by_task(training_data: Path) -> None:
    found = by_task(TokenDataset(training_data / "val.jsonl"))
    assert {t: p[:, 1].tolist() for t, p in found.items()} == {
        "task0": [0, 2, 4], "task1": [1, 3, 5],
    }  # fmt: skip


# --- losses and attention -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_in_pieces_equals_plain_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states = (torch.randn(600, 16) / 4).to(dtype).requires_grad_()
    head = torch.randn(50, 16).to(dtype).requires_grad_()
    targets, share = torch.randint(50, (600,)), torch.rand(600)
    total, each = ChunkedCrossEntropy.apply(states, head, targets, share, 0.1)  # type: ignore[no-untyped-call]
    (total / 7).backward()
    found = [states.grad, head.grad]
    states.grad = head.grad = None
    logits = (states @ head.t()).float()
    expected = F.cross_entropy(logits, targets, reduction="none")
    (((expected + 0.1 * logits.logsumexp(-1) ** 2) * share).sum() / 7).backward()
    close = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert torch.allclose(each, expected, atol=close)
    for one, other in zip(found, [states.grad, head.grad], strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=close, rtol=close)


def test_every_kernel_that_is_here_gives_the_same_gradients() -> None:
    generator = np.random.default_rng(0)
    documents = [np.array(document(generator, n, "")["tokens"]) for n in (3, 30, 8)]
    rows = collate(
        [build_sequence(documents[:2], MARKS), build_sequence(documents[2:], MARKS)], MARKS
    )
    assert sequence_lengths(rows["position_ids"])[0] == [len(d) for d in documents[:2]]
    results = []
    for kernel in ("stock", "sdpa"):
        decoder = TINY.decoder(torch.float32).train()
        if kernel != "stock":
            assert set_attention(decoder, "auto", torch.float32) == kernel
        loss = decoder(**rows).loss
        loss.backward()
        results.append((loss.item(), decoder.model.embed_tokens.weight.grad))
    assert abs(results[0][0] - results[1][0]) < 1e-5
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)


def test_another_document_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool = True
) -> None:
    generator = np.random.default_rng(0)
    one, other, third = (np.array(document(generator, 9, "")["tokens"]) for _ in range(3))
    decoder = TINY.decoder(torch.float32).train()
    set_attention(decoder, "sdpa", torch.float32)
    hidden: list[torch.Tensor] = []
    decoder.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
    for step in (0, 1):
        if step:
            decoder.gradient_checkpointing_enable({"use_reentrant": False})
        for second in (other, third):
            decoder(**collate([build_sequence([one, second], MARKS)], MARKS))
    kept = int((build_sequence([one], MARKS)["labels"] != IGNORE_INDEX).sum())
    for found in hidden[1:]:
        assert torch.allclose(found[:kept], hidden[0][:kept], atol=1e-6)


def test_a_kernel_that_is_not_here_is_refused_with_the_reason() -> None:
    decoder = TINY.decoder(torch.float32)
    if not torch.cuda.is_available():
        for name in ("flash", "flex", "xformers"):
            with pytest.raises(UserError, match=f"--attention {name}: its kernel needs CUDA"):
                set_attention(decoder, name, torch.bfloat16)  # type: ignore[arg-type]
    assert attention.lacks("sdpa", torch.float32) is None


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainer": {"fsdp": "full_shard"}}, "FSDP is not supported; .*zero3.json"),
        ({"trainer": {"learning_rate": 1}}, "learning_rate is set by --lr"),
        ({"trainer": {"no_such": 1}}, "no_such: TrainingArguments has no such field"),
        ({"global_bs": 3, "bs": 2}, "--global_bs is 3, not a multiple of --bs 2 times 1 ranks"),
        ({"quantize": "4bit", "trainable": "full"}, "weights of 4 or 8 bits do not learn"),
        ({"group_by_length": True, "pack": True}, "exclude each other"),
        ({"tie_head_norms": True}, "--tie_head_norms is for --trainable full"),
        ({"sample_prompts": Path("x")}, "name --val_data as well"),
    ],
)
def test_options_that_do_not_go_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainOptions(train_data=["x"], ckpt="tiny", output_dir=Path("o"), **fields)


def test_accumulation_follows_from_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    options = TrainOptions(train_data=["x"], ckpt="tiny", output_dir=Path("o"), bs=2, global_bs=48)
    assert options.accumulation() == 6
    assert options.rows_a_step == 48


def test_ds_config_is_the_one_that_medmax_users_look_for() -> None:
    shipped = ROOT / "training" / "ds_config.json"
    assert shipped.read_text() == (ROOT / "training" / "deepspeed" / "zero2.json").read_text()


# --- what is told and refused before the first step -------------------------------------------


def plan(**fields: Any) -> TrainingMemoryEstimate:
    config = TINY.config()
    values: dict[str, Any] = {
        "learned": 10**6, "total": 10**8, "tokens_a_batch": 4096, "labelled_a_batch": 1000,
        "bytes_a_number": 2, "checkpointing": False, "zero_stage": 0, "ranks": 8, "config": config,
    }  # fmt: skip
    return TrainingMemoryEstimate(**{**values, **fields})


def test_memory_is_estimated_by_part() -> None:
    plain, sharded = plan().memory(), plan(zero_stage=3).memory()
    assert sharded["weights"] == plain["weights"] / 8
    assert plan(checkpointing=True).memory()["activations"] < plain["activations"] / 2
    cpu = torch.device("cpu")
    assert "GB are free" in preflight.check_memory(plan(), cpu, 1)
    with pytest.raises(UserError, match=r"does not fit.*--gradient_checkpointing.*--no_preflight"):
        preflight.check_memory(plan(total=10**14), cpu, 1)


def test_disk_is_counted_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert preflight.expected_checkpoints("steps", 1000, 100, 1, None) == 11
    assert preflight.expected_checkpoints("steps", 1000, 100, 1, 2) == 3
    assert preflight.expected_checkpoints("no", 1000, 100, 1, None) == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10**7))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="save_total_limit"):
        preflight.check_disk(plan(), tmp_path / "new" / "folder", 11)


# --- runs -------------------------------------------------------------------------------------


def test_a_run_tells_proves_and_samples(
    training_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "Show me a CT scan."}\n')
    output = tmp_path / "run"
    more = ["--val_data", training_data / "val.jsonl", "--pack", "--max_length", 256, "--epoch", 1]
    more += ["--bs", 2, "--eval_steps", 3, "--save_strategy", "steps", "--save_steps", 2]
    more += ["--sample_prompts", prompts, "--trainer", '{"save_total_limit": 1}']
    assert train.main(words(training_data, output, *more)) == 0
    said = capsys.readouterr().out
    for told in ("parameters learn", "memory: about", "disk: about", "time:", "\u27e6"):
        assert told in said
    state = json.loads((output / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    assert all(entry["trained_tokens_per_second"] > 0 for entry in steps)
    shards = TokenDataset(training_data / "train.jsonl")
    learned = sum(
        int((build_sequence([ids], MARKS)["labels"] != IGNORE_INDEX).sum()) for ids in shards
    )
    seen = steps[-1]["seen_text_tokens"] + steps[-1]["seen_image_tokens"]
    assert seen == learned  # every token that has a label, once
    told = [e for e in state["log_history"] if e["step"] == 3 and any("eval" in n for n in e)]
    tasks = [next(e for e in told if f"eval_{name}_loss" in e) for name in ("task0", "task1")]
    whole = next(e for e in told if "eval_loss" in e)
    tokens = [e[f"eval_{n}_trained_tokens"] for e, n in zip(tasks, ("task0", "task1"), strict=True)]
    found = sum(
        e[f"eval_{n}_loss"] * t for e, n, t in zip(tasks, ("task0", "task1"), tokens, strict=True)
    )
    assert whole["eval_loss"] == pytest.approx(found / sum(tokens))
    with open(output / "log.csv", encoding="utf-8", newline="") as file:
        assert sum(bool(row["loss"]) for row in csv.DictReader(file)) == len(steps)
    with Image.open(output / "loss.png") as image:
        assert image.width > 500
    assert len(list(output.glob("checkpoint-*"))) == 1
    assert list((output / "samples").glob("step-3/*.png"))


def test_not_a_number_stops_the_run_and_names_the_documents(
    training_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--lr", "1e30", "--warmup_ratio", 0, "--lr_scheduler", "constant", "--bs", 2]
    more += ["--trainer", '{"max_grad_norm": 0}']
    assert train.main(words(training_data, tmp_path / "run", *more)) == 2
    said = capsys.readouterr().err
    assert "the loss is nan at step" in said
    assert f"{training_data / 'train.jsonl'} document " in said


def test_a_first_step_without_gradients_stops_the_run() -> None:
    layer = torch.nn.Linear(2, 2)
    proof = GradientCheckCallback(layer, lambda: 1.0)
    layer(torch.ones(1, 2)).sum().backward()
    proof.on_step_end(None, None, None)
    cut = GradientCheckCallback(layer, lambda: 1.0)
    GradientCheckCallback(layer, lambda: 0.0).on_step_end(
        None, None, None
    )  # blank rows prove nothing
    with pytest.raises(UserError, match="no gradient reached 2 tensors, bias among them"):
        cut.on_step_end(None, None, None)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_an_adapter_learns_over_a_quantised_base(
    training_data: Path, tmp_path: Path, kind: str
) -> None:
    assert (
        train.main(words(training_data, tmp_path, "--quantize", kind, "--steps", 3, "--bs", 4)) == 0
    )
    _, tensors = read_adapter(tmp_path)
    assert all("lora_" in name for name in tensors)
    assert len(losses(tmp_path)) == 3


def test_a_second_stage_goes_on_with_the_adapter_of_the_first(
    training_data: Path, tmp_path: Path
) -> None:
    assert train.main(words(training_data, tmp_path / "one", "--steps", 4, "--bs", 4)) == 0
    more = ["--steps", 1, "--bs", 4, "--adapter", tmp_path / "one", "--warmup_ratio", 0]
    assert train.main(words(training_data, tmp_path / "two", *more)) == 0
    assert losses(tmp_path / "two")[0] < losses(tmp_path / "one")[0]
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()


def test_the_saved_adapter_merged_gives_the_trained_models_logits(
    training_data: Path, tmp_path: Path
) -> None:
    more = ["--steps", 3, "--bs", 4, "--trainable", "lora+image_head", "--learn", "everything"]
    assert train.main(words(training_data, tmp_path, *more)) == 0
    ids = torch.from_numpy(TokenDataset(training_data / "val.jsonl")[0])[None]
    trained = load_adapter(TINY.decoder(torch.float32), tmp_path)
    merged = TINY.decoder(torch.float32)
    state = {n: t.float() for n, t in merged_tensors(TINY, tmp_path)}
    merged.load_state_dict(state, strict=False)
    with torch.inference_mode():
        one, other = trained(ids).logits, merged(ids).logits
    # What is merged is rounded to bfloat16, of eight bits, once more.
    assert (one - other).abs().max() < 2**-7 * one.abs().max()


def test_the_tiny_recipes_losses_are_the_recorded_ones(training_data: Path, tmp_path: Path) -> None:
    """Recorded on x86 with torch 2.13; other kernels round otherwise."""
    recipe = ROOT / "training" / "recipes" / "demo.yaml"
    more = ["--config", recipe, "--ds", "null", "--steps", 6, "--save_strategy", "no"]
    assert train.main(words(training_data, tmp_path, *more)) == 0
    expected = json.loads((ROOT / "tests" / "recorded_losses.json").read_text())
    assert losses(tmp_path) == pytest.approx(expected, rel=5e-3)


RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=[p.stem for p in RECIPES])
def test_every_recipe_trains_at_toy_size(
    training_data: Path, tmp_path: Path, recipe: Path, tiny_context: int
) -> None:
    more: list[object] = ["--config", recipe, "--ds", "null", "--bs", 2, "--grad_acc", 1]
    more += [
        "--global_bs",
        2,
        "--steps",
        1,
        "--warmup_ratio",
        0,
        "--max_length",
        min(384, tiny_context),
    ]
    assert train.main(words(training_data, tmp_path, *more)) == 0
    assert (tmp_path / "manifest.json").exists()


@pytest.fixture(scope="session")
def tiny_context() -> int:
    return int(TINY.config().max_position_embeddings)


def test_batches_without_a_label_cost_nothing_and_stop_nothing(
    training_data: Path, tmp_path: Path
) -> None:
    """Blank rows, and text rows where pictures alone are learned."""
    generator = np.random.default_rng(0)
    rows = [document(generator, 9, "a") for _ in range(3)]
    rows[1]["tokens"] = [MARKS.bos, *range(MARKS.image + 1, MARKS.image + 9), MARKS.eos]
    path = tmp_path / "mixed.jsonl"
    write_jsonl(path, iter(rows))
    write_manifest(path, {}, [], TINY.fingerprint())
    more: list[object] = ["--train_data", path, "--val_data", path, "--learn", "pictures"]
    more += ["--trainable", "image_head", "--grad_acc", 2, "--warmup_ratio", 0, "--epoch", 2]
    assert train.main(words(training_data, tmp_path / "run", *more)) == 0
    assert len(losses(tmp_path / "run", "eval_a_loss")) == 1
    medmax = ["--compat", "medmax", "--bs", 5, "--warmup_ratio", 0]
    assert train.main(words(training_data, tmp_path / "medmax", *medmax)) == 0


def test_a_share_of_steps_between_saves_is_counted_as_one() -> None:
    assert preflight.expected_checkpoints("steps", 4000, 0.5, 1, None) == 3


# --- going on ---------------------------------------------------------------------------------
