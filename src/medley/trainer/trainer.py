"""transformers' Trainer over rows of documents: losses by modality, speed, and no silent NaN.

Shapes: B rows, S row length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from medley.errors import UserError
from medley.trainer.data import ROW, PackedDataset
from medley.trainer.preflight import FlopCounter


class MixedModalTrainer(Trainer):  # type: ignore[misc]
    """Counts weights rather than places; logs losses by modality, tokens by modality, tokens a
    second, the share of the device's arithmetic that is used, memory, and the time left.

    `work` says how many operations a token takes; `group_by_length` puts rows of like lengths
    into one batch.
    """

    def __init__(self, *args: Any, work: FlopCounter, group_by_length: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.work, self.group_by_length = work, group_by_length
        self._sums = {kind: torch.zeros(4, dtype=torch.float64) for kind in ("train", "eval")}
        self._validated = torch.zeros(4, dtype=torch.float64)  # over the tasks of one validation
        self._executed = 0  # tokens that went through the layers of this rank, since the last log
        self._since = time.monotonic()
        self.last_labels = 0.0  # weight of the labels of the last step, of all ranks

    @property
    def decoder(self) -> Any:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not self.group_by_length:
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        assert isinstance(rows, PackedDataset)
        a_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return GroupedByLength(
            [*rows.lengths, *[1] * rows.blank],
            a_step * self.args.world_size,
            lambda: self.args.seed + int((self.state.epoch or 0) + 1e-6),
        )

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
        total = total.clamp(min=1e-8)  # of a step without a single label: its loss is 0
        self.last_labels = float(total) if total > 1e-7 else 0.0
        return total

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        rows = inputs.pop(ROW)
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not bool(loss.isfinite()):
            self._refuse(float(loss.detach()), rows, model.training)
        sums = self.decoder.loss_sums
        if sums is not None:
            self._sums["train" if model.training else "eval"] += sums.cpu()
        self._executed += inputs["input_ids"].numel() if model.training else 0
        return result

    def _refuse(self, loss: float, rows: Tensor, training: bool) -> None:
        data = self.train_dataset if training else None
        names = (
            [n for r in rows.tolist() for n in data.names(r)]
            if isinstance(data, PackedDataset)
            else []
        )
        listed = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
        raise UserError(
            f"the loss is {loss} at step {self.state.global_step + 1}"
            f"{' of training' if training else ' of validation'}; the batch was: {listed or rows}. "
            "Look at these documents; else lower --lr, or use --bf16 in place of --fp16, and go "
            "on from the last checkpoint with --resume"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        losses = [n for n in logs if n == "loss" or (n.startswith("eval_") and n.endswith("_loss"))]
        if losses:
            prefix = losses[0].removesuffix("loss")
            kind = "eval" if prefix else "train"
            executed = self._sums[kind].new_tensor([self._executed])
            sums = torch.cat([self._sums[kind], executed]).to(self.args.device)
            if self.args.world_size > 1:
                sums = self.accelerator.gather(sums[None]).sum(0)
            tokens = float(sums[4])
            if kind == "eval":
                self._validated += sums[:4].cpu()
            logs |= self._losses(prefix, sums[:4])
            if kind == "train":
                logs |= self._speed(float(sums[1]), float(sums[3]), tokens)
            self._sums[kind].zero_()
        super().log(logs, *args, **kwargs)

    def _losses(self, prefix: str, sums: Tensor) -> dict[str, float]:
        """By modality; of validation the whole, too: transformers gives the mean of batches,
        whatever their labels."""
        text, texts, image, images = sums.tolist()
        found = {f"{prefix}text_loss": text / texts} if texts else {}
        found |= {f"{prefix}image_loss": image / images} if images else {}
        share = self.decoder.loss_options.image_weight
        if prefix and texts + share * images:
            found[f"{prefix}loss"] = (text + share * image) / (texts + share * images)
        return found | {f"{prefix}trained_tokens": texts + images}

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Of several tasks each one's losses, and those of all of them as `eval_loss` and so on."""
        if not isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict):
            return dict(super().evaluate(eval_dataset, *args, **kwargs))
        self._validated.zero_()
        found = dict(super().evaluate(eval_dataset, *args, **kwargs))
        whole = self._losses("eval_", self._validated)
        super().log(whole)
        return found | whole

    def _speed(self, texts: float, images: float, executed: float) -> dict[str, float]:
        seconds = time.monotonic() - self._since
        self._since, self._executed = time.monotonic(), 0
        before: dict[str, Any] = next(
            (e for e in reversed(self.state.log_history) if "seen_text_tokens" in e), {}
        )
        done = self.state.global_step - before.get("step", self.state.global_step)
        left = (self.state.max_steps - self.state.global_step) * seconds / max(done, 1)
        operations = self.work.operations(executed, texts + images)
        return {
            "seen_text_tokens": before.get("seen_text_tokens", 0) + texts,
            "seen_image_tokens": before.get("seen_image_tokens", 0) + images,
            "trained_tokens_per_second": (texts + images) / seconds,
            "flop_utilisation": operations / seconds / self.args.world_size / self.work.peak,
            "memory_gb": memory_in_use(self.args.device) / 1e9,
            "seconds_left": left,
        }


class GroupedByLength(Sampler[int]):
    """Rows of like lengths side by side, in an order that depends on `seed()` alone: on the epoch,
    not on what was read before, so that a run that is gone on with sees the same."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: Callable[[], int]) -> None:
        self.lengths, self.batch, self.seed = lengths, batch, seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed())
        grouped: list[int] = get_length_grouped_indices(
            self.lengths, self.batch, generator=generator
        )
        return iter(grouped)


def memory_in_use(device: torch.device) -> int:
    """Bytes: the peak on a GPU, or what this process holds on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil  # accelerate brings it

    return int(psutil.Process().memory_info().rss)
