"""What stands beside a run: proof that it learns, its course as a table and a picture, samples."""

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

COURSE, PICTURE = "log.csv", "loss.png"


class GradientCheckCallback(TrainerCallback):  # type: ignore[misc]
    """Stops a run whose first step gave no gradient to what shall learn, as happens silently where
    gradient checkpointing cuts an adapter off from the loss."""

    def __init__(self, model: torch.nn.Module, labels: Callable[[], float]) -> None:
        """`labels` gives the weight of all labels in the last step, of all ranks."""
        self.labels = labels
        self.reached: set[str] = set()
        self.alive = False
        learned = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = {name for name, _ in learned}
        self._hooks = [p.register_hook(self._hook(name)) for name, p in learned]  # type: ignore[no-untyped-call]

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            self.reached.add(name)
            if not self.alive:
                self.alive = bool((gradient != 0).any())

        return see

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._hooks or not self.labels():  # a step of blank rows proves nothing
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        seen = [(self.reached, self.alive)]
        if dist.is_initialized():  # one rank may have had blank rows only
            seen *= dist.get_world_size()
            dist.all_gather_object(seen, (self.reached, self.alive))
        missing = sorted(self.names.difference(*(reached for reached, _ in seen)))
        if missing or not any(alive for _, alive in seen):
            what = f"{len(missing)} tensors, {missing[0]} among them" if missing else "all tensors"
            raise UserError(
                f"no gradient reached {what} in the first step: nothing there would be learned "
                "(labels in the data? --gradient_checkpointing with these versions? see `medley "
                "doctor`)"
            )


class LossCurveCallback(TrainerCallback):  # type: ignore[misc]
    """`log.csv` with every logged figure, and `loss.png`, renewed at saves and at the end."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_loss_curve(Path(args.output_dir), state.log_history)

    on_train_end = on_save


def write_loss_curve(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for entry in history for name in entry))
    with (
        atomic_file(folder / COURSE) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)
    plot_losses(folder / PICTURE, history)


def plot_losses(path: Path, history: Sequence[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure  # slow to import; needs no display this way

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(n for e in history for n in e if n == "loss" or n.endswith("_loss"))
    names.pop("train_loss", None)  # the mean over the whole run, logged once
    for name in names:
        points = [(e["step"], e[name]) for e in history if name in e]
        axes.plot(*zip(*points, strict=True), label=name, marker="." * (len(points) < 30))
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
    axes.grid(visible=True, alpha=0.3)
    if names:
        axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


class SampleCallback(TrainerCallback):  # type: ignore[misc]
    """Answers a few prompts at every validation, into `samples/step-N/`.

    `answer` is given a folder and fills it.
    """

    def __init__(self, answer: Callable[[Path], None]) -> None:
        self.answer = answer

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / "samples" / f"step-{state.global_step}"
        if is_main_rank() and not folder.exists():  # once, where validation has several tasks
            model = kwargs["model"]
            training = model.training
            model.eval()
            folder.mkdir(parents=True)
            with torch.random.fork_rng():  # the run's own randomness goes on as without samples
                self.answer(folder)
            model.train(training)
