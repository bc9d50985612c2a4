"""Trains the decoder on token sequences: LoRA, its image head, or all of it.

In: tokens files (tokenizer.tokenize_jsonl) and a base checkpoint in any layout. Out: an adapter in
PEFT's layout, or a whole checkpoint in Hugging Face's, with log.csv, loss.png, trainer_state.json.

    torchrun --nproc-per-node=2 -m medley train --train_data tokens.jsonl --ckpt BASE \
        --ds training/deepspeed/zero2.json --output_dir out --lora --bf16
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from medley.checkpoints.adapter import trainable_model
from medley.checkpoints.checkpoint import TINY, Checkpoint, open_checkpoint, write_hugging_face
from medley.data.packing import IGNORE_INDEX
from medley.data.preview import example_text
from medley.data.vocabulary import TextTokenizer, Vocabulary
from medley.doctor import versions
from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.inference.batch import generate_all, read_prompts, save_response
from medley.inference.loading import local_device
from medley.inference.model import Model
from medley.modeling.attention import set_attention
from medley.modeling.chameleon import LossOptions, tie_head_norms
from medley.modeling.quantization import quantize_layers
from medley.trainer import checkpointing, preflight
from medley.trainer.callbacks import (
    GradientCheckCallback,
    LossCurveCallback,
    SampleCallback,
    write_loss_curve,
)
from medley.trainer.data import PackedDataset, PackingConfig, WeightedSource, by_task, open_shards
from medley.trainer.options import TrainOptions
from medley.trainer.trainer import MixedModalTrainer
from medley.utils.cli_options import resolved
from medley.utils.distributed import (
    barrier,
    from_main_rank,
    is_main_rank,
    local_world_size,
    world_size,
)
from medley.utils.files import partial_hash, write_json
from medley.utils.manifest import write_manifest

# What a run that is gone on with must not change: its next losses and weights hang on these.
KEPT = (
    "epoch", "steps", "lr", "lr_scheduler", "warmup_ratio", "learn", "compat", "max_length",
    "image_loss_weight", "z_loss", "group_by_length", "bf16", "fp16", "quantize", "lora_r",
    "lora_alpha", "lora_rslora", "lora_dropout", "lora_target", "tie_head_norms",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def prepare_environment(options: TrainOptions) -> None:
    """DeepSpeed reads these when it is imported."""
    # PEFT would ask a hub about the base model at every save.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs and one process: start it with torchrun "
            "--nproc-per-node, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if options.ds is not None:
        if "RANK" not in os.environ:  # started without torchrun: DeepSpeed would ask for MPI
            alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}
            os.environ.update({name: str(value) for name, value in alone.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(f"--ds {options.ds}: deepspeed is not installed; leave out --ds")
        # Its extensions are built by ninja, which a virtual environment keeps beside python.
        bin_folder = str(Path(sys.executable).parent)
        os.environ["PATH"] = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Names that are newer than the oldest transformers we take; PEFT looking for a base on a hub.
    for message in (".*gradient_checkpointing.* is deprecated", ".*base_model_name_or_path.*",
                    "Could not find a config file"):  # fmt: skip
        warnings.filterwarnings("ignore", message=message)
    if options.wandb_entity:
        os.environ["WANDB_ENTITY"] = options.wandb_entity


def row_options(options: TrainOptions, base: Checkpoint) -> PackingConfig:
    """Raises UserError for a --max_length that the context or one whole picture does not fit."""
    context = base.config().max_position_embeddings
    length = options.max_length or context
    if length > context:
        raise UserError(f"--max_length is {length}, the model's context is {context}")
    least = base.vqgan()[0].config.codes_per_image + 4  # with its two marks, <s> and </s>
    if length < least:
        raise UserError(f"--max_length is {length}: one whole picture needs {least} at least")
    return PackingConfig(
        length, options.pack, options.learn, options.compat == "medmax", options.seed,
        options.max_samples,
    )  # fmt: skip


def open_rows(
    options: TrainOptions, chosen: PackingConfig, base: Checkpoint, vocabulary: Vocabulary
) -> tuple[PackedDataset, dict[str, PackedDataset] | None]:
    """Rows to learn from, and rows to validate on by task."""
    weighted = [WeightedSource.parse(text) for text in options.train_data]
    files = [(open_shards(w.path, base, vocabulary), w.weight) for w in weighted]
    train = PackedDataset(files, vocabulary, chosen, pad_to=options.rows_a_step)
    if options.val_data is None:
        return train, None
    shards = open_shards(options.val_data, base, vocabulary)
    tasks = by_task(shards)
    at_once = options.bs * world_size()
    rows = {
        task: PackedDataset([(shards, 1.0)], vocabulary, chosen, places, at_once)
        for task, places in tasks.items()
    }
    return train, rows


def go_on_from(options: TrainOptions, train: PackedDataset) -> Path | None:
    """The checkpoint to go on from; None for a fresh run."""
    run = {
        "ranks": world_size(), "global_bs": options.rows_a_step, "seed": options.seed,
        "rows": len(train.rows), "trainable": options.trainable, "pack": options.pack,
        "train_data": [partial_hash(shards.path) for shards in train.shards],
        "zero_stage": options.zero_stage, **{name: getattr(options, name) for name in KEPT},
    }  # fmt: skip
    return checkpointing.resolve_resume(options.output_dir, options.resume, run)


def make_model(options: TrainOptions, base: Checkpoint, vocabulary: Vocabulary) -> tuple[Any, str]:
    """What learns, and the name of the attention's kernel."""
    transformers.set_seed(options.seed)  # for the adapter's first weights
    decoder = base.decoder(options.dtype)
    decoder.loss_options = LossOptions(options.image_loss_weight, options.z_loss)
    kernel = set_attention(decoder, options.attention, options.compute_dtype)
    if options.quantize is not None:
        quantize_layers(decoder, options.quantize, options.compute_dtype)
        decoder.to(local_device("auto" if torch.cuda.is_available() else "cpu"))
    if options.tie_head_norms:
        tie_head_norms(decoder)
    model = trainable_model(
        decoder, options.trainable, vocabulary, _base_name(options.ckpt),
        rank=options.lora_r, alpha=options.lora_alpha, rslora=options.lora_rslora,
        dropout=options.lora_dropout, targets=options.lora_target, start=options.adapter,
    )  # fmt: skip
    return model, kernel


def tell_before_the_first_step(
    options: TrainOptions, trainer: MixedModalTrainer, train: PackedDataset, text: TextTokenizer
) -> None:
    """Quantities, and one row as the model will learn it. Raises UserError where it cannot fit."""
    model, arguments = trainer.model, trainer.args
    total = sum(preflight.size_of(p) for p in model.parameters())
    learned = preflight.count_trainable(model.parameters())
    mean = sum(train.lengths) / len(train.rows)
    steps = options.steps or round(len(train) * options.epoch / options.rows_a_step)
    labels = [
        int((train[i]["labels"] != IGNORE_INDEX).sum()) for i in range(min(50, len(train.rows)))
    ]
    longest = max(train.lengths)
    plan = preflight.TrainingMemoryEstimate(
        learned, total, longest * options.bs, max(labels) * options.bs,
        options.dtype.itemsize, options.gradient_checkpointing, options.zero_stage, world_size(),
        trainer.decoder.config, sum(p.numel() * p.element_size() for p in model.parameters()),
        options.offloads,
    )  # fmt: skip
    work = trainer.work
    operations = work.operations(mean, float(np.mean(labels))) * steps * options.rows_a_step
    estimate = operations / work.peak / world_size() * 2.5  # products reach less than their peak
    lines = [
        f"{len(train.documents)} documents of {sum(train.lengths)} tokens in {len(train.rows)} "
        f"rows of {mean:.0f} tokens on average ({longest} at most)",
        f"{learned:,} of {total:,} parameters learn; {steps} steps of {options.rows_a_step} rows",
        f"time: {preflight.format_duration(estimate)} or so, by this device's matrix products",
    ]
    lines += [f"{name} {version}: {note}" for name, version, note in versions() if "range" in note]
    if options.preflight:
        limit = options.trainer.get("save_total_limit")
        saves = preflight.expected_checkpoints(
            options.save_strategy, steps, options.save_steps,
            steps * options.rows_a_step / len(train), limit,
        )  # fmt: skip
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        there = weights if next(model.parameters()).device == arguments.device else 0
        lines.append(preflight.check_memory(plan, arguments.device, local_world_size(), there))
        lines.append(preflight.check_disk(plan, options.output_dir, saves))
    if is_main_rank():
        row = train[0]
        known = (
            (row["labels"] != IGNORE_INDEX)
            .int()
            .diff(prepend=torch.zeros(1), append=torch.zeros(1))
        )
        spans = zip(
            (known == 1).nonzero().squeeze(1).tolist(),
            (known == -1).nonzero().squeeze(1).tolist(),
            strict=True,
        )
        shown = example_text(row["input_ids"].tolist(), text, list(spans))
        print("\n".join(lines), f"\nthe first row, what it learns in brackets:\n{shown[:2000]}\n")


def sampler(options: TrainOptions, base: Checkpoint, decoder: Any) -> Callable[[Path], None]:
    """Answers --sample_prompts with the model as it is."""
    assert options.sample_prompts is not None
    prompts = read_prompts(options.sample_prompts)
    text, images = base.text_tokenizer(), base.image_tokenizer()

    def answer(folder: Path) -> None:
        inner = decoder()
        model = Model(inner, text, images)
        mode = "any" if images.has_decoder else "text"
        longest = images.codes_per_image + 2 + 512  # a picture, and words about it
        chosen = GenerationOptions(mode=mode, max_new_tokens=longest, seed=options.seed)
        with torch.autocast(inner.device.type, options.compute_dtype, options.bf16 or options.fp16):
            asked = ((number, prompt, chosen) for number, prompt in enumerate(prompts))
            rows = [
                save_response(folder, number, found) for number, found in generate_all(model, asked)
            ]
        rows.sort(key=lambda row: row["index"])
        write_json(folder / "responses.json", rows)
        print(f"samples of this step: {rows}")

    return answer


def train(options: TrainOptions) -> None:
    prepare_environment(options)
    base = open_checkpoint(options.ckpt)
    text = base.text_tokenizer()
    vocabulary = text.vocabulary
    chosen = row_options(options, base)
    train, val = open_rows(options, chosen, base, vocabulary)
    start = go_on_from(options, train)
    if start is not None and (options.output_dir / "manifest.json").exists():
        print(f"{options.output_dir}: this run has finished already")
        return
    universal = start is not None and checkpointing.needs_conversion(start, world_size())
    # Before the arguments: once they name ZeRO-3, transformers has every new model taken apart.
    model, kernel = make_model(options, base, vocabulary)
    arguments = options.arguments(universal)
    if start is not None and universal:
        from_main_rank(lambda: checkpointing.to_universal_checkpoint(start))
    full = options.trainable == "full"
    trainer = MixedModalTrainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=val,
        data_collator=train.collate,
        callbacks=[
            checkpointing.VerifiedCheckpointCallback(options.trainer.get("save_total_limit")), LossCurveCallback(),
        ],
        work=preflight.estimate_flops(model, full, options.gradient_checkpointing, arguments.device),
        group_by_length=options.group_by_length,
    )  # fmt: skip
    trainer.add_callback(GradientCheckCallback(model, lambda: trainer.last_labels))
    if options.sample_prompts is not None:
        trainer.add_callback(SampleCallback(sampler(options, base, lambda: trainer.decoder)))
    if is_main_rank():
        print(f"attention: {kernel}")
    tell_before_the_first_step(options, trainer, train, text)
    if start is not None and checkpointing.is_complete(start):  # stopped before its last save
        trainer._load_from_checkpoint(str(start))
        trainer.state = TrainerState.load_from_json(str(start / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    save(trainer, base, options)
    steps_told = {e["step"] for e in trainer.state.log_history if any("eval" in n for n in e)}
    if val is not None and trainer.state.global_step not in steps_told:
        trainer.evaluate()
        trainer.save_state()
        if is_main_rank():
            write_loss_curve(options.output_dir, trainer.state.log_history)


def save(trainer: MixedModalTrainer, base: Checkpoint, options: TrainOptions) -> None:
    trainer.save_state()
    if options.trainable == "full":
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # ZeRO-3 gathers
        if is_main_rank():
            names = [name for name, _ in base.tensors()]
            dtype = base.dtype()
            tensors = ((name, state[name].detach().cpu().to(dtype)) for name in names)
            # DeepSpeed would have the decoder that is read back taken apart over the ranks.
            unset_hf_deepspeed_config()
            write_hugging_face(options.output_dir / "model", base, tensors)
            open_checkpoint(options.output_dir / "model").decoder()  # read back: names and shapes
    else:
        trainer.save_model(str(options.output_dir))
        if is_main_rank():
            checkpointing.check_saved_adapter(options.output_dir, trainer.model)
    if is_main_rank():
        data = [WeightedSource.parse(text).path for text in options.train_data]
        write_manifest(options.output_dir, resolved(options), data, base.fingerprint())
        where = options.output_dir / ("model" if options.trainable == "full" else "")
        print(f"saved and read back: {where}")
    barrier()


def _base_name(ckpt: str) -> str:
    """What adapter_config.json calls the base: a whole path, so that it is found again."""
    return ckpt if ckpt == TINY and not Path(ckpt).is_dir() else str(Path(ckpt).resolve())
