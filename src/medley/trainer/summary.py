"""The summary of a run before its first step: quantities, estimates, and the first sequence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from medley.data.packing import IGNORE_INDEX
from medley.data.preview import preview_text
from medley.data.vocabulary import TextTokenizer
from medley.doctor import versions
from medley.modeling.chunked_loss import chunk_bytes
from medley.trainer import preflight
from medley.trainer.activations import FLOAT32, ActivationEstimate
from medley.trainer.data import PackedDataset
from medley.trainer.options import TrainOptions
from medley.trainer.preflight import TrainingMemoryEstimate
from medley.trainer.trainer import MixedModalTrainer
from medley.utils.distributed import is_main_rank, local_world_size, world_size

SAMPLED_SEQUENCES = 50  # sequences whose labels are counted for the estimates
SHOWN_CHARACTERS = 2000  # of the first sequence
# Training reaches about 1 / 2.5 of the speed of a large matrix product.
TIME_FACTOR = 2.5


def print_run_summary(
    options: TrainOptions, trainer: MixedModalTrainer, dataset: PackedDataset, text: TextTokenizer
) -> None:
    """Prints the summary. Raises UserError if the run does not fit into memory or on the disk."""
    model = trainer.model
    total = sum(preflight.num_elements(p) for p in model.parameters())
    trainable = preflight.count_trainable(model.parameters())
    num_sequences = len(dataset.sequences)
    mean_length, longest = sum(dataset.lengths) / num_sequences, max(dataset.lengths)
    batch_size = options.global_batch_size
    steps = options.steps or round(len(dataset) * options.epoch / batch_size)
    labels = [
        int((dataset[i]["labels"] != IGNORE_INDEX).sum())
        for i in range(min(SAMPLED_SEQUENCES, num_sequences))
    ]
    flops = trainer.flops.count(mean_length, float(np.mean(labels))) * steps * batch_size
    seconds = flops / trainer.flops.peak_flops / world_size() * TIME_FACTOR
    lines = [
        f"{len(dataset.documents)} documents of {sum(dataset.lengths)} tokens in {num_sequences} "
        f"sequences of {mean_length:.0f} tokens on average (longest: {longest})",
        f"{trainable:,} of {total:,} parameters are trained; {steps} steps of {batch_size} "
        "sequences",
        f"time: about {preflight.format_duration(seconds)}, by the speed of this device's matrix "
        "products",
    ]
    lines += [f"{name} {version}: {note}" for name, version, note in versions() if "range" in note]
    if options.preflight:
        device = trainer.args.device
        estimate = estimate_memory(options, model, longest * options.bs, max(labels) * options.bs,
                                   device)  # fmt: skip
        loaded = estimate.weight_bytes if next(model.parameters()).device == device else 0
        checkpoints = preflight.expected_checkpoints(
            options.save_strategy, steps, options.save_steps, steps * batch_size / len(dataset),
            options.trainer.get("save_total_limit"),
        )  # fmt: skip
        lines.append(preflight.check_memory(estimate, device, local_world_size(), loaded))
        lines.append(preflight.check_disk(estimate, options.output_dir, checkpoints))
    if is_main_rank():
        sequence = dataset[0]
        shown = preview_text(
            sequence["input_ids"].tolist(), text, labeled_spans(sequence["labels"])
        )
        print("\n".join(lines))
        print(
            f"The first sequence; the tokens in brackets have labels:\n{shown[:SHOWN_CHARACTERS]}\n"
        )


def estimate_memory(
    options: TrainOptions, model: Any, tokens: int, labels: int, device: torch.device
) -> TrainingMemoryEstimate:
    """The memory of one rank, for `tokens` tokens with `labels` labels in its batch."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    peft = getattr(model, "peft_config", {}).get("default")
    itemsize = options.compute_dtype.itemsize
    uses_deepspeed = options.ds is not None  # casts all weights to half precision
    decoder = model if peft is None else model.get_base_model()
    modules = decoder.model.layers.named_modules()
    targets = {name.rpartition(".")[2] for name, module in modules if hasattr(module, "lora_A")}
    activations = ActivationEstimate(
        decoder.config, itemsize, full=peft is None, adapted=targets,
        rank=getattr(peft, "r", 0), dropout=getattr(peft, "lora_dropout", 0) > 0,
        autocast=itemsize < FLOAT32 and not uses_deepspeed,
        keeps_inputs=options.quantize == "8bit", on_cuda=device.type == "cuda",
    )  # fmt: skip
    needs_whole_head = options.zero_stage == 3 and "image_head" in options.trainable
    return TrainingMemoryEstimate(
        preflight.count_trainable(trained), sum(preflight.num_elements(p) for p in parameters),
        tokens, labels, itemsize if uses_deepspeed else max(p.itemsize for p in trained),
        options.gradient_checkpointing, options.zero_stage, world_size(), activations,
        sum(preflight.num_bytes(p) for p in parameters), options.offloads,
        math.inf if needs_whole_head else chunk_bytes(device),
        # A CPU provides the pages of the buffer only as far as gradients fill it.
        options.gradient_bucket if device.type == "cuda" else 0,
    )  # fmt: skip


def labeled_spans(labels: torch.Tensor) -> list[tuple[int, int]]:
    """The ranges (start, end) of consecutive labels in a sequence, labels int64 (S,)."""
    labeled = (labels != IGNORE_INDEX).int()
    edges = labeled.diff(prepend=torch.zeros(1), append=torch.zeros(1))
    starts, ends = ((edges == sign).nonzero().squeeze(1).tolist() for sign in (1, -1))
    return list(zip(starts, ends, strict=True))
