"""The baseline of the training benchmarks: transformers' Trainer with PEFT.

Batches of complete documents, padded on the right; the usual loss over all logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peft
import torch
import transformers
from torch import Tensor

from medley.checkpoints.checkpoint import open_checkpoint
from medley.data.packing import IGNORE_INDEX, build_labels
from medley.modeling.chameleon import ChameleonForConditionalGeneration
from medley.trainer.parameters import PROJECTIONS

Sampling = Literal["random", "group_by_length"]


class DenseLossDecoder(ChameleonForConditionalGeneration):
    """The same decoder with the loss of transformers' classes, which builds all logits at once."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None,
                **kwargs: Any) -> Any:  # fmt: skip
        items = kwargs.pop("num_items_in_batch", None)
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        logits = self.lm_head(hidden)
        loss = self.loss_function(
            logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=items
        )
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def train_baseline(
    documents: Sequence[Any],
    output: Path,
    batch: int,
    learning_rate: float,
    rank: int = 16,
    alpha: int = 16,
    epochs: float = 1,
    sampling: Sampling = "random",
    bf16: bool = False,
) -> dict[str, float]:
    """Trains LoRA on `tiny` and saves the adapter.

    Args:
        sampling: the Trainer's `train_sampling_strategy`
        bf16: the Trainer's bfloat16 autocast; float32 otherwise

    Returns:
        the seconds of the training alone, and its steps
    """
    tiny = open_checkpoint("tiny")
    vocabulary = tiny.text_tokenizer().vocabulary
    transformers.set_seed(0)
    decoder = tiny.decoder(torch.float32)
    decoder.__class__ = DenseLossDecoder
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(PROJECTIONS),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(decoder, config)

    def collate(batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in batch)
        padding = {"input_ids": vocabulary.pad, "labels": IGNORE_INDEX, "attention_mask": 0}
        rows: dict[str, list[Any]] = {name: [] for name in padding}
        for ids in (row["input_ids"] for row in batch):
            row = {"input_ids": ids, "labels": build_labels(ids, vocabulary),
                   "attention_mask": np.ones(len(ids), np.int64)}  # fmt: skip
            for name, value in padding.items():
                rows[name].append(np.pad(row[name], (0, length - len(ids)), constant_values=value))
        return {name: torch.from_numpy(np.stack(values)) for name, values in rows.items()}

    arguments = transformers.TrainingArguments(
        output_dir=str(output), per_device_train_batch_size=batch, num_train_epochs=epochs,
        learning_rate=learning_rate, warmup_steps=0.1, lr_scheduler_type="cosine",
        report_to="none", use_cpu=True, logging_steps=5, save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True, train_sampling_strategy=sampling,
        bf16=bf16,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, data_collator=collate,
        train_dataset=[{"input_ids": ids} for ids in documents],
    )  # fmt: skip
    seconds = float(trainer.train().metrics["train_runtime"])
    model.save_pretrained(str(output))
    return {"seconds": seconds, "steps": trainer.state.global_step}
