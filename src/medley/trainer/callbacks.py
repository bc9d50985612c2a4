"""Trainer callbacks: gradient check, loss curve, and samples at validation."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from medley.errors import UserError
from medley.utils.distributed import is_main_rank
from medley.utils.files import atomic_file

LOG_FILE, LOSS_PLOT = "log.csv", "loss.png"


class GradientCheckCallback(TrainerCallback):  # type: ignore[misc]
    """Stops a run in which trained weights get no gradient in the first step.

    Such a run would train nothing, silently; gradient checkpointing, for example, can detach an
    adapter from the loss.
    """

    def __init__(self, model: torch.nn.Module, label_weight: Callable[[], float]) -> None:
        """`label_weight` returns the weight of all labels in the last step, of all ranks."""
        self.label_weight = label_weight
        self.names_with_gradient: set[str] = set()
        self.has_nonzero_gradient = False
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.trained_names = {name for name, _ in trained}
        self._hooks = [p.register_hook(self._make_hook(name)) for name, p in trained]  # type: ignore[no-untyped-call]

    def _make_hook(self, name: str) -> Callable[[Tensor], None]:
        def record(gradient: Tensor) -> None:
            self.names_with_gradient.add(name)
            if not self.has_nonzero_gradient:
                self.has_nonzero_gradient = bool((gradient != 0).any())

        return record

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._hooks or not self.label_weight():  # a step without labels has no gradients
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        own = (self.names_with_gradient, self.has_nonzero_gradient)
        all_ranks = [own]
        if dist.is_initialized():  # one rank may have had blank sequences only
            all_ranks *= dist.get_world_size()
            dist.all_gather_object(all_ranks, own)
        missing = sorted(self.trained_names.difference(*(names for names, _ in all_ranks)))
        if missing or not any(nonzero for _, nonzero in all_ranks):
            affected = f"{len(missing)} tensors (first: {missing[0]})" if missing else "all tensors"
            raise UserError(
                f"No gradient reached {affected} in the first step, so they would not be trained. "
                "Check that the data has labels, and the versions with `medley doctor`; try "
                "without --gradient_checkpointing."
            )


class LossCurveCallback(TrainerCallback):  # type: ignore[misc]
    """Writes `log.csv` with all logged values, and `loss.png`, at each save and at the end."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_loss_curve(Path(args.output_dir), state.log_history)

    on_train_end = on_save


def write_loss_curve(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """Writes `log.csv` and `loss.png` from the entries of a run's log."""
    names = list(dict.fromkeys(name for entry in history for name in entry))
    with (
        atomic_file(folder / LOG_FILE) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)
    plot_losses(folder / LOSS_PLOT, history)


def plot_losses(path: Path, history: Sequence[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure  # slow to import; this class needs no display

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(n for e in history for n in e if n == "loss" or n.endswith("_loss"))
    names.pop("train_loss", None)  # the mean over the whole run, logged once
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        axes.plot(*zip(*points, strict=True), label=name, marker="." * (len(points) < 30))
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    axes.grid(visible=True, alpha=0.3)
    if names:
        axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


class SampleCallback(TrainerCallback):  # type: ignore[misc]
    """Generates samples into `samples/step-N/` at every validation.

    `generate` writes the samples into the folder that it gets.
    """

    def __init__(self, generate: Callable[[Path], None]) -> None:
        self.generate = generate

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / "samples" / f"step-{state.global_step}"
        # This is called once for each task of a validation: only the first call generates.
        if is_main_rank() and not folder.exists():
            model = kwargs["model"]
            training = model.training
            model.eval()
            folder.mkdir(parents=True)
            # The run's random state is the same as without samples, on the CPU and on its GPU.
            with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
                self.generate(folder)
            model.train(training)
