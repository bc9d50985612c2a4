"""Training's parts: datasets, losses and attention, options, estimates, gradient check."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from training_runs import random_document, tiny, tiny_vocabulary

from medley.data.packing import IGNORE_INDEX, SequenceTooLong, build_sequence, collate
from medley.data.token_dataset import TokenDataset
from medley.errors import UserError
from medley.modeling.attention import Documents, set_attention, unavailable_reason
from medley.modeling.chunked_loss import ChunkedCrossEntropy
from medley.trainer import checkpointing, deepspeed, preflight
from medley.trainer.activations import ActivationEstimate
from medley.trainer.callbacks import GradientCheckCallback
from medley.trainer.data import PackedDataset, PackingConfig, WeightedSource, group_by_task
from medley.trainer.options import TrainOptions
from medley.trainer.preflight import TrainingMemoryEstimate
from medley.trainer.run import prepare_environment
from medley.trainer.summary import labeled_spans
from medley.utils import extras
from medley.utils.cli_options import parse
from medley.utils.files import write_json

# --- datasets -------------------------------------------------------------------------------


def test_weights_repeat_or_subsample_the_documents_of_a_file(training_data: Path) -> None:
    assert WeightedSource.parse("a.jsonl:0.5") == WeightedSource(Path("a.jsonl"), 0.5)
    assert WeightedSource.parse("a:b.jsonl") == WeightedSource(Path("a:b.jsonl"))
    with pytest.raises(UserError, match=r"invalid weight \(got 0, expected above 0\)"):
        WeightedSource.parse("a.jsonl:0")
    first = TokenDataset(training_data / "train.jsonl")
    second = TokenDataset(training_data / "val.jsonl")
    config = PackingConfig(400, seed=3)
    dataset = PackedDataset([(first, 0.5), (second, 2.5)], tiny_vocabulary(), config)
    assert np.bincount(dataset.documents[:, 0]).tolist() == [12, 15]
    from_second = dataset.documents[dataset.documents[:, 0] == 1, 1]
    assert set(np.bincount(from_second).tolist()) == {2, 3}
    config = PackingConfig(400, seed=3, max_samples=5)
    small = PackedDataset([(first, 1.0)], tiny_vocabulary(), config)
    assert len(small) == 5
    assert small.documents.tolist() == sorted(small.documents.tolist())


def test_blank_sequences_fill_the_last_step_and_contain_no_document(training_data: Path) -> None:
    source = TokenDataset(training_data / "train.jsonl")
    config = PackingConfig(400, pack=True)
    dataset = PackedDataset([(source, 1.0)], tiny_vocabulary(), config, multiple_of=5)
    assert len(dataset) % 5 == 0
    assert len(dataset) > len(dataset.sequences)
    blank = dataset[len(dataset) - 1]
    assert (blank["labels"] == IGNORE_INDEX).all()
    assert dataset.document_names(len(dataset) - 1) == []
    names = [name for i in range(len(dataset)) for name in dataset.document_names(i)]
    assert sorted(names) == sorted(f"{source.path} document {i}" for i in range(24))
    batch = dataset.collate([dataset[0], blank])
    assert batch["sequence_index"].tolist() == [0, len(dataset) - 1]
    with pytest.raises(SequenceTooLong, match="--max_length is 70"):
        PackedDataset([(source, 1.0)], tiny_vocabulary(), PackingConfig(70))


def test_validation_documents_are_grouped_by_task(training_data: Path) -> None:
    tasks = group_by_task(TokenDataset(training_data / "val.jsonl"))
    assert {task: documents[:, 1].tolist() for task, documents in tasks.items()} == {
        "task0": [0, 2, 4], "task1": [1, 3, 5],
    }  # fmt: skip


def test_labeled_spans_are_the_ranges_of_labels() -> None:
    ignored = IGNORE_INDEX
    labels = torch.tensor([5, 6, ignored, ignored, 7, ignored, 8])
    assert labeled_spans(labels) == [(0, 2), (4, 5), (6, 7)]
    assert labeled_spans(torch.tensor([ignored])) == []


# --- losses and attention -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_equals_plain_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states = (torch.randn(600, 16) / 4).to(dtype).requires_grad_()
    head = torch.randn(50, 16).to(dtype).requires_grad_()
    targets, weights = torch.randint(50, (600,)), torch.rand(600)
    total, token_losses = ChunkedCrossEntropy.apply(states, head, targets, weights, 0.1)  # type: ignore[no-untyped-call]
    (total / 7).backward()
    gradients = [states.grad, head.grad]
    states.grad = head.grad = None
    logits = (states @ head.t()).float()
    expected = F.cross_entropy(logits, targets, reduction="none")
    (((expected + 0.1 * logits.logsumexp(-1) ** 2) * weights).sum() / 7).backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert torch.allclose(token_losses, expected, atol=tolerance)
    for found, plain in zip(gradients, [states.grad, head.grad], strict=True):
        assert found is not None
        assert plain is not None
        assert torch.allclose(found, plain, atol=tolerance, rtol=tolerance)


def test_stock_and_sdpa_attention_give_the_same_gradients() -> None:
    generator = np.random.default_rng(0)
    vocabulary = tiny_vocabulary()
    documents = [np.array(random_document(generator, n, "")["tokens"]) for n in (3, 30, 8)]
    packed = [build_sequence(part, vocabulary) for part in (documents[:2], documents[2:])]
    batch = collate(packed, vocabulary)
    first, second, third = (len(d) for d in documents)
    padding = first + second - third
    assert Documents.of(batch["position_ids"]).lengths == (first, second, third, padding)
    losses, gradients = [], []
    for kernel in ("stock", "sdpa"):
        decoder = tiny().decoder(torch.float32).train()
        if kernel != "stock":
            assert set_attention(decoder, "auto", torch.float32) == kernel
        loss = decoder(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(decoder.model.embed_tokens.weight.grad)
    assert abs(losses[0] - losses[1]) < 1e-5
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


def test_packed_documents_do_not_affect_each_others_hidden_states() -> None:
    generator = np.random.default_rng(0)
    vocabulary = tiny_vocabulary()
    first, second, third = (np.array(random_document(generator, 9, "")["tokens"]) for _ in range(3))
    decoder = tiny().decoder(torch.float32).train()
    set_attention(decoder, "sdpa", torch.float32)
    states: list[torch.Tensor] = []
    decoder.lm_head.register_forward_pre_hook(lambda _, args: states.append(args[0].detach()))
    for recompute in (False, True):
        if recompute:
            decoder.gradient_checkpointing_enable({"use_reentrant": False})
        for neighbor in (second, third):
            decoder(**collate([build_sequence([first, neighbor], vocabulary)], vocabulary))
    labels = int((build_sequence([first], vocabulary)["labels"] != IGNORE_INDEX).sum())
    for other in states[1:]:
        assert torch.allclose(other[:labels], states[0][:labels], atol=1e-6)


def test_unavailable_attention_kernels_are_refused_with_the_reason() -> None:
    decoder = tiny().decoder(torch.float32)
    if not torch.cuda.is_available():
        for name in ("flash", "flex", "xformers"):
            with pytest.raises(UserError, match=f"--attention {name}: .*CUDA"):
                set_attention(decoder, name, torch.bfloat16)  # type: ignore[arg-type]
    assert unavailable_reason("sdpa", torch.float32) is None


# --- options ----------------------------------------------------------------------------------


def make_options(**fields: Any) -> TrainOptions:
    return TrainOptions(train_data=["x"], ckpt="tiny", output_dir=Path("o"), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainer": {"fsdp": "full_shard"}}, "FSDP is not supported. Use --ds zero3"),
        ({"trainer": {"learning_rate": 1}}, "learning_rate is set by --lr"),
        ({"trainer": {"no_such": 1}}, "no_such: TrainingArguments has no such field"),
        ({"global_bs": 3, "bs": 2}, "--global_bs is 3, not a multiple of --bs 2 times 1 ranks"),
        ({"quantize": "4bit", "trainable": "full"}, "weights of 4 or 8 bits cannot be trained"),
        ({"quantize": "4bit", "ds": "zero3"}, "Use --ds zero2"),
        ({"group_by_length": True, "pack": True}, "cannot be combined"),
        ({"tie_head_norms": True}, "--tie_head_norms requires --trainable full"),
        ({"sample_prompts": Path("x")}, "Add --val_data"),
        ({"ds": "zero9"}, "no configuration of that name .*zero2, zero3, zero3_offload"),
    ],
)
def test_conflicting_options_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_options(**fields)


def test_accumulation_follows_from_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    options = make_options(bs=2, global_bs=48)
    assert options.accumulation_steps() == 6
    assert options.global_batch_size == 48


def test_old_spelling_of_train_on_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--train_data", "x", "--ckpt", "tiny", "--output_dir", "o"]
    flags += ["--learn", "pictures"]  # alias
    assert parse(TrainOptions, "train", flags).train_on == "images"
    assert "--learn is deprecated" in capsys.readouterr().err


def test_deepspeed_configurations_are_found_by_name_and_by_path() -> None:
    named = {name: deepspeed.read_config(name) for name in deepspeed.config_names()}
    assert {name: c["zero_optimization"]["stage"] for name, c in named.items()} == {
        "zero2": 2, "zero3": 3, "zero3_offload": 3,
    }  # fmt: skip
    for name, config in named.items():  # the paths that MedMax users know
        assert (
            deepspeed.read_config(str(ROOT / "training" / "deepspeed" / f"{name}.json")) == config
        )
    assert deepspeed.read_config(str(ROOT / "training" / "ds_config.json")) == named["zero2"]
    assert make_options(ds="zero3_offload").offloads
    assert make_options().zero_stage == 0


def test_missing_optional_packages_are_reported_before_data_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = extras.importlib.util.find_spec
    missing = {"deepspeed", "tensorboard", "bitsandbytes"}
    monkeypatch.setattr(
        extras.importlib.util, "find_spec", lambda n: None if n in missing else find_spec(n)
    )
    for fields, message in (
        ({"ds": "zero2"}, r"--ds needs deepspeed.*medley-mm\[train\]"),
        ({"quantize": "4bit"}, r"--quantize needs bitsandbytes.*medley-mm\[quantize\]"),
        ({"trainer": {"report_to": "tensorboard"}}, r"report_to tensorboard needs tensorboard"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_environment(make_options(**fields))


# --- estimates and checks before and in the first step ----------------------------------------


def estimate(**fields: Any) -> TrainingMemoryEstimate:
    values: dict[str, Any] = {
        "trainable_params": 10**6, "total_params": 10**8, "tokens_per_batch": 4096,
        "labels_per_batch": 1000, "bytes_per_param": 2, "gradient_checkpointing": False,
        "zero_stage": 0, "world_size": 8, "activations": ActivationEstimate(tiny().config(), 2),
    }  # fmt: skip
    return TrainingMemoryEstimate(**{**values, **fields})


def test_memory_estimate_depends_on_zero_stage_and_checkpointing() -> None:
    plain, sharded = estimate().memory(), estimate(zero_stage=3).memory()
    assert sharded["weights"] == plain["weights"] / 8
    recomputed = estimate(gradient_checkpointing=True).memory()
    assert recomputed["activations"] < plain["activations"] / 2
    cpu = torch.device("cpu")
    assert "GB are free" in preflight.check_memory(estimate(), cpu, 1)
    with pytest.raises(UserError, match=r"does not fit.*--gradient_checkpointing.*--no_preflight"):
        preflight.check_memory(estimate(total_params=10**14), cpu, 1)


def test_checkpoints_that_exceed_the_disk_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10**7))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="save_total_limit"):
        preflight.check_disk(estimate(), tmp_path / "new" / "folder", 11)


@pytest.mark.parametrize(
    ("strategy", "steps", "save_steps", "limit", "expected"),
    [
        ("steps", 1000, 100, None, 11),
        ("steps", 1000, 100, 2, 3),
        ("no", 1000, 100, None, 1),
        ("steps", 4000, 0.5, None, 3),  # save_steps below 1 is a fraction of all steps
    ],
)
def test_expected_checkpoints(
    strategy: str, steps: int, save_steps: float, limit: int | None, expected: int
) -> None:
    assert preflight.expected_checkpoints(strategy, steps, save_steps, 1, limit) == expected


def test_first_step_without_gradients_raises() -> None:
    layer = torch.nn.Linear(2, 2)
    with_gradients = GradientCheckCallback(layer, lambda: 1.0)
    layer(torch.ones(1, 2)).sum().backward()
    with_gradients.on_step_end(None, None, None)
    without_labels = GradientCheckCallback(layer, lambda: 0.0)
    without_labels.on_step_end(None, None, None)  # a step of blank sequences is not checked
    without_gradients = GradientCheckCallback(layer, lambda: 1.0)
    with pytest.raises(UserError, match=r"No gradient reached 2 tensors \(first: bias\)"):
        without_gradients.on_step_end(None, None, None)


# --- resuming ---------------------------------------------------------------------------------


def complete_checkpoint(output_dir: Path, recorded: dict[str, Any], name: str = "") -> Path:
    folder = output_dir / (name or "checkpoint-3")
    folder.mkdir(parents=True)
    (folder / checkpointing.COMPLETE).write_text(recorded.get("run_id", ""))
    write_json(output_dir / checkpointing.RUN_IDENTITY, recorded)
    return folder


def test_resume_requires_the_same_options_but_not_the_same_ranks(tmp_path: Path) -> None:
    identity = {"world_size": 2, "global_bs": 8, "lr": 0.1}
    with pytest.raises(UserError, match="no complete checkpoint to resume from"):
        checkpointing.resolve_resume(tmp_path, True, identity)
    folder = complete_checkpoint(tmp_path, identity)
    with pytest.raises(UserError, match="contains checkpoints or results of another run"):
        checkpointing.resolve_resume(tmp_path, False, identity)
    assert checkpointing.resolve_resume(tmp_path, True, {**identity, "world_size": 1}) == folder
    with pytest.raises(UserError, match=r"lr was 0\.1, now 0\.2"):
        checkpointing.resolve_resume(tmp_path, True, {**identity, "lr": 0.2})
    with pytest.raises(UserError, match=r"global_bs was 8, now 4.*on 1 rank\(s\).*--global_bs 8"):
        checkpointing.resolve_resume(tmp_path, True, {**identity, "world_size": 1, "global_bs": 4})


def test_runs_of_the_earlier_version_are_resumable(tmp_path: Path) -> None:
    recorded = {"ranks": 2, "global_bs": 8, "rows": 5, "learn": "pictures"}  # alias
    folder = complete_checkpoint(tmp_path, recorded)
    identity = {"world_size": 1, "global_bs": 8, "sequences": 5, "train_on": "images"}
    assert checkpointing.resolve_resume(tmp_path, True, identity) == folder


def test_incomplete_checkpoints_of_the_run_are_removed(tmp_path: Path) -> None:
    record = {"global_bs": 8, "run_id": "own", "checkpoints": ["checkpoint-3", "checkpoint-6"]}
    folder = complete_checkpoint(tmp_path, record)
    for name in ("checkpoint-6", "checkpoint-9", "checkpoint-best"):
        (tmp_path / name).mkdir()
    identity = {"world_size": 1, "global_bs": 8}
    assert checkpointing.resolve_resume(tmp_path, True, identity) == folder
    assert not (tmp_path / "checkpoint-6").exists()
    assert (tmp_path / "checkpoint-9").exists() and (tmp_path / "checkpoint-best").exists()
    assert json.loads((tmp_path / checkpointing.RUN_IDENTITY).read_text()) == record
