"""transformers' Trainer over packed rows: losses by modality, and saves that are proven.

Shapes: B rows, S row length.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from medley.adapters import read_adapter
from medley.checkpoints import is_adapter
from medley.medmax import medmax_collate
from medley.packing import Learn, SequenceTooLong, best_fit, make_row, stack_rows
from medley.token_shards import TokenShards
from medley.vocabulary import Vocabulary

COMPLETE = "COMPLETE"  # written last into a checkpoint folder: one without it is half-written


class Rows(Dataset[dict[str, Tensor]]):
    """The rows of a tokens file: one document each, or packed up to `max_length`.

    `learn` says which tokens have labels; `as_medmax` gives batches MedMax's labels instead, by
    the rule of their first row.

    Raises SequenceTooLong for a document longer than `max_length`, and UserError for a token
    that the vocabulary does not have.
    """

    def __init__(
        self,
        shards: TokenShards,
        vocabulary: Vocabulary,
        max_length: int,
        pack: bool,
        learn: Learn = "answers",
        as_medmax: bool = False,
    ) -> None:
        self.shards, self.vocabulary = shards, vocabulary
        self.learn: Learn = learn
        self.as_medmax = as_medmax
        lengths = shards.lengths.tolist()
        longest = max(lengths, default=0)
        if longest > max_length:
            raise SequenceTooLong(
                f"{shards.path}: document {lengths.index(longest)} has {longest} tokens, "
                f"--max_length is {max_length}: raise it, or tokenize with --max_length "
                f"{max_length} --overflow drop"
            )
        self.rows = best_fit(lengths, max_length) if pack else [[i] for i in range(len(lengths))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        documents = [self.shards[i] for i in self.rows[index]]
        return make_row(documents, self.vocabulary, self.learn)

    def collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = stack_rows(rows, self.vocabulary)
        if self.as_medmax:
            ids = [row["input_ids"].tolist() for row in rows]
            batch["labels"] = medmax_collate(ids, self.vocabulary)["labels"]
        return batch


class MixedModalTrainer(Trainer):  # type: ignore[misc]
    """Counts weights rather than places, and logs text and image loss beside the loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums = {kind: torch.zeros(4, dtype=torch.float64) for kind in ("train", "eval")}

    @property
    def decoder(self) -> Any:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Tensor]], device: torch.device
    ) -> Tensor | None:
        """The sum of label weights over all ranks and accumulated batches."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        weights = [self.decoder.label_weights(batch["labels"]).sum() for batch in batch_samples]
        total = torch.stack(weights).sum().to(device)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        sums = self.decoder.loss_sums
        if sums is not None:
            self._sums["train" if model.training else "eval"] += sums.cpu()
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs or "eval_loss" in logs:
            kind = "train" if "loss" in logs else "eval"
            prefix = "" if kind == "train" else "eval_"
            sums = self._sums[kind].to(self.args.device)
            if self.args.world_size > 1:
                sums = self.accelerator.gather(sums[None]).sum(0)
            text, texts, image, images = sums.tolist()
            logs |= {f"{prefix}text_loss": text / texts} if texts else {}
            logs |= {f"{prefix}image_loss": image / images} if images else {}
            logs |= {f"{prefix}trained_tokens": texts + images}
            self._sums[kind].zero_()
        super().log(logs, *args, **kwargs)


class ProvenSaves(TrainerCallback):  # type: ignore[misc]
    """Reads an adapter back after every save, and only then marks the folder as complete."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            if is_adapter(folder):
                read_adapter(folder)
            (folder / COMPLETE).touch()


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that was saved whole; half-written ones are passed over."""
    found = {
        int(path.parent.name.removeprefix("checkpoint-")): path.parent
        for path in folder.glob(f"checkpoint-*/{COMPLETE}")
    }
    return found[max(found)] if found else None
