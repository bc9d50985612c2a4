"""transformers' Trainer with losses by modality, throughput, and an error for non-finite losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from medley.errors import UserError
from medley.trainer.data import SEQUENCE_INDEX, PackedDataset
from medley.trainer.preflight import FlopCounter
from medley.utils.distributed import is_main_rank

SHORT_RUN = 5  # steps; up to this number a run has no warm-up


class MixedModalTrainer(Trainer):  # type: ignore[misc]
    """Normalizes the loss by label weights, and logs more values than transformers' Trainer.

    Logged are losses and tokens by modality, tokens per second, model FLOPs utilization (MFU),
    memory and the remaining time.

    Args:
        flops: counts the operations of a step
        group_by_length: form batches from sequences of similar length
    """

    def __init__(
        self, *args: Any, flops: FlopCounter, group_by_length: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.flops, self.group_by_length = flops, group_by_length
        # Text loss, text labels, image loss and image labels since the last log entry.
        self._sums = {kind: torch.zeros(4, dtype=torch.float64) for kind in ("train", "eval")}
        self._eval_sums = torch.zeros(4, dtype=torch.float64)  # over all tasks of one validation
        self._tokens_processed = 0  # on this rank since the last log entry, padding included
        self._last_log_time = time.monotonic()
        self.last_label_weight = torch.zeros(())  # of the last step, over all ranks
        # Losses of this optimizer step that were not checked yet, and their sequences.
        self._unchecked: list[tuple[Tensor, Tensor]] = []
        self.add_callback(_LossCheckCallback(self.check_losses))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Leaves out the warm-up of a very short run.

        A warm-up begins at a learning rate of zero: such a run would learn little, or nothing.
        """
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup and is_main_rank():
            print(warmup_notice(warmup, num_training_steps, self.args.learning_rate))
        if warmup and num_training_steps <= SHORT_RUN:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def decoder(self) -> Any:
        """The decoder below an adapter."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.group_by_length:
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        assert isinstance(dataset, PackedDataset)
        per_rank = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(
            [*dataset.lengths, *[1] * dataset.num_blank],
            per_rank * self.args.world_size,
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
        self.last_label_weight = total
        return total.clamp(min=1e-8)  # the loss of a step without labels is 0, not 0 / 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        indices = inputs.pop(SEQUENCE_INDEX)
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        kind = "train" if model.training else "eval"
        # In training nothing here may wait for the device: it would idle in every batch.
        if model.training:
            self._unchecked.append((loss.detach(), indices))
            self._tokens_processed += inputs["input_ids"].numel()
        elif not bool(loss.isfinite()):
            self._raise_nonfinite(float(loss), indices, False)
        sums = self.decoder.loss_sums
        if sums is not None:
            self._sums[kind] = self._sums[kind].to(sums.device, sums.dtype) + sums
        return result

    def check_losses(self) -> None:
        """Raises UserError for a loss of this optimizer step that is NaN or infinite."""
        if not self._unchecked:
            return
        losses = torch.stack([loss for loss, _ in self._unchecked]).tolist()
        unchecked, self._unchecked = self._unchecked, []
        for loss, (_, indices) in zip(losses, unchecked, strict=True):
            if not math.isfinite(loss):
                self._raise_nonfinite(loss, indices, True)

    def _raise_nonfinite(self, loss: float, indices: Tensor, training: bool) -> None:
        dataset = self.train_dataset if training else None
        names = (
            [name for index in indices.tolist() for name in dataset.document_names(index)]
            if isinstance(dataset, PackedDataset)
            else []
        )
        listed = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
        raise UserError(
            f"The {'training' if training else 'validation'} loss is {loss} at step "
            f"{self.state.global_step + 1}. The batch contained: "
            f"{listed or f'sequences {indices.tolist()}'}. Check these documents. Otherwise lower "
            "--lr, or use --bf16 instead of --fp16, and continue with --resume."
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        losses = [n for n in logs if n == "loss" or (n.startswith("eval_") and n.endswith("_loss"))]
        if losses:
            prefix = losses[0].removesuffix("loss")
            kind = "eval" if prefix else "train"
            processed = self._sums[kind].new_tensor([self._tokens_processed])
            sums = torch.cat([self._sums[kind], processed]).to(self.args.device)
            if self.args.world_size > 1:
                sums = self.accelerator.gather(sums[None]).sum(0)
            if kind == "eval":
                self._eval_sums += sums[:4].cpu()
            logs |= self._losses(prefix, sums[:4])
            if kind == "train":
                logs |= self._throughput(float(sums[1]), float(sums[3]), float(sums[4]))
            self._sums[kind].zero_()
        super().log(logs, *args, **kwargs)

    def _losses(self, prefix: str, sums: Tensor) -> dict[str, float]:
        """Mean losses by modality, and for a validation over both.

        transformers computes the mean of the batches' losses, however many labels each has.
        """
        text_loss, text_tokens, image_loss, image_tokens = sums.tolist()
        losses = {f"{prefix}text_loss": text_loss / text_tokens} if text_tokens else {}
        losses |= {f"{prefix}image_loss": image_loss / image_tokens} if image_tokens else {}
        image_weight = self.decoder.loss_options.image_weight
        weight = text_tokens + image_weight * image_tokens
        if prefix and weight:
            losses[f"{prefix}loss"] = (text_loss + image_weight * image_loss) / weight
        return losses | {f"{prefix}trained_tokens": text_tokens + image_tokens}

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validates. With several tasks, `eval_loss` and so on are over all of them."""
        if not isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict):
            return dict(super().evaluate(eval_dataset, *args, **kwargs))
        self._eval_sums.zero_()
        metrics = dict(super().evaluate(eval_dataset, *args, **kwargs))
        total = self._losses("eval_", self._eval_sums)
        super().log(total)
        return metrics | total

    def _throughput(
        self, text_tokens: float, image_tokens: float, processed: float
    ) -> dict[str, float]:
        """Tokens so far, speed, memory and remaining time, for the steps since the last entry.

        `text_tokens` and `image_tokens` have labels; `processed` tokens went through the layers.
        """
        now = time.monotonic()
        seconds = now - self._last_log_time
        self._last_log_time, self._tokens_processed = now, 0
        names = ("text_tokens", "seen_text_tokens")  # alias
        history = reversed(self.state.log_history)
        last: dict[str, Any] = next((e for e in history if any(n in e for n in names)), {})
        text_before = last.get("text_tokens", last.get("seen_text_tokens", 0))  # alias
        image_before = last.get("image_tokens", last.get("seen_image_tokens", 0))  # alias
        steps = self.state.global_step - last.get("step", self.state.global_step)
        steps_left = self.state.max_steps - self.state.global_step
        labeled = text_tokens + image_tokens
        per_rank = self.flops.count(processed, labeled) / self.args.world_size
        return {
            "text_tokens": text_before + text_tokens,
            "image_tokens": image_before + image_tokens,
            "tokens_per_second": labeled / seconds,
            "mfu": per_rank / seconds / self.flops.peak_flops,
            "memory_gb": memory_in_use(self.args.device) / 1e9,
            "seconds_left": steps_left * seconds / max(steps, 1),
        }


class _LossCheckCallback(TrainerCallback):  # type: ignore[misc]
    """Checks the losses once for each optimizer step, before the weights change.

    DeepSpeed changes them within the last backward pass of a step; no checkpoint has been saved.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check()


def warmup_notice(warmup: int, steps: int, lr: float) -> str:
    """What the warm-up does to the first steps."""
    if steps <= SHORT_RUN:
        return (
            f"no warm-up: the run has {steps} steps, and a warm-up begins at learning rate 0. The "
            f"first step has {lr:g} (--lr)."
        )
    return (
        f"warm-up: the learning rate is 0 in the first step and rises to {lr:g} within {warmup} "
        f"of {steps} steps"
    )


class LengthGroupedSampler(Sampler[int]):
    """Orders sequences so that batches have similar lengths.

    The order depends only on `seed()`, which differs by epoch: a resumed run sees the same
    batches. (The sampler of transformers continues one random generator.)
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: Callable[[], int]) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed())
        order: list[int] = get_length_grouped_indices(
            self.lengths, self.batch_size, generator=generator
        )
        return iter(order)


def memory_in_use(device: torch.device) -> int:
    """Bytes: the peak on a GPU, or the resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
