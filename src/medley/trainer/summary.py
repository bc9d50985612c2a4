"""The summary of a run before its first step: quantities, estimates, and the first sequence."""

from __future__ import annotations

import numpy as np
import torch

from medley.data.packing import IGNORE_INDEX
from medley.data.preview import preview_text
from medley.data.vocabulary import TextTokenizer
from medley.doctor import versions
from medley.trainer import preflight
from medley.trainer.data import PackedDataset
from medley.trainer.options import TrainOptions
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
        weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        estimate = preflight.TrainingMemoryEstimate(
            trainable, total, longest * options.bs, max(labels) * options.bs,
            options.dtype.itemsize, options.gradient_checkpointing, options.zero_stage,
            world_size(), trainer.decoder.config, weight_bytes, options.offloads,
        )  # fmt: skip
        device = trainer.args.device
        loaded = weight_bytes if next(model.parameters()).device == device else 0
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


def labeled_spans(labels: torch.Tensor) -> list[tuple[int, int]]:
    """The ranges (start, end) of consecutive labels in a sequence, labels int64 (S,)."""
    labeled = (labels != IGNORE_INDEX).int()
    edges = labeled.diff(prepend=torch.zeros(1), append=torch.zeros(1))
    starts, ends = ((edges == sign).nonzero().squeeze(1).tolist() for sign in (1, -1))
    return list(zip(starts, ends, strict=True))
