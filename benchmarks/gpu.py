"""What one GPU gives with a model of 7B parameters: one command, one JSON line, 9 minutes at most.

    python benchmarks/gpu.py

Needs no argument, no download and no weights: random weights are made on the device. Each section
runs in a process of its own with a time limit, so that a section that fails, hangs or breaks the
device's state is recorded with its error and the next one runs. The JSON line at the end has each
figure, its goal, and whether it was reached. docs/gpu.md explains the figures and where to send
the line. On a CPU the same code runs with a tiny model; the line then has `"counts": false`, and
only the comparisons of results are judged, not the speeds.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pkgutil
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

# torch.cuda.is_available() would initialize CUDA otherwise, and a process that did must not fork.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch
import transformers.models.chameleon.modeling_chameleon  # noqa: F401  # slow: once for all sections

from medley.errors import UserError
from medley.utils.cli_options import run_program
from medley.version import __version__

TOTAL_SECONDS = 525  # of all sections; the rest of 9 minutes is for starting
CPU_SECONDS = 240  # the limit of one section at tiny size, on a machine that is busy
NOTE = "a tiny model: the code ran, and no speed counts"
# In order of importance, with the limit of each in seconds. They are imported in the process of
# their section, since PEFT imports bitsandbytes, which initializes CUDA.
SECTIONS = {
    "vqgan": ("gpu_generation:encode_images", 65),
    "decode": ("gpu_generation:decode_text", 75),
    "images": ("gpu_generation:generate_images", 95),
    "lora": ("gpu_training:train_lora", 80),
    "faults": ("gpu_generation:provoke_faults", 50),
    "kernels": ("gpu_training:compare_kernels", 60),
    "merge": ("gpu_training:merge_lora", 35),
    "quantized": ("gpu_generation:decode_quantized", 65),
}


@dataclass(frozen=True)
class Options:
    """Measures one GPU, or runs the same code at tiny size on a CPU.

    Args:
        device: auto (CUDA if there is any), cuda, cuda:N or cpu
        size: size of the model; auto is 7b on a GPU and tiny on a CPU
        sections: names of the sections to run, separated by commas; all of them if not given
    """

    device: str = "auto"
    size: Literal["auto", "7b", "tiny"] = "auto"
    sections: str = ",".join(SECTIONS)


@dataclass
class Figure:
    """One figure. `passed` is None if it has no goal, or if no speed counts on this device."""

    name: str
    value: Any
    unit: str = ""
    goal: float | None = None
    passed: bool | None = None


@dataclass
class Report:
    """What a section measures on, and where it puts its figures.

    Attributes:
        device: the device
        size: key of `random_models.SIZES`
        counts: whether figures of speed and memory are compared with their goals
        send: called with each figure at once, so that a section that is ended keeps its figures
    """

    device: torch.device
    size: str
    counts: bool
    send: Callable[[Figure], None] = field(repr=False)

    def add(
        self,
        name: str,
        value: float | str | None,
        unit: str = "",
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Records a figure of speed or memory, which has a goal on a GPU."""
        goal = at_most if at_least is None else at_least
        passed = None
        if goal is not None and self.counts:
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            passed = is_number and (value >= goal if at_least is not None else value <= goal)
        self.send(Figure(name, _rounded(value), unit, _rounded(goal), passed))

    def check(self, name: str, passed: bool, value: Any = None) -> None:
        """Records a comparison of results, which counts on every device."""
        self.send(Figure(name, _rounded(value), passed=bool(passed)))


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(argv: list[str] | None = None) -> int:
    return run_program("benchmarks/gpu.py", Options, work, argv)


def work(options: Options) -> None:
    start = time.perf_counter()
    chosen = options.sections.split(",")
    if unknown := [name for name in chosen if name not in SECTIONS]:
        raise UserError(
            f"--sections: No such section (got {', '.join(unknown)}, expected some of "
            f"{', '.join(SECTIONS)})."
        )
    machine = in_process(describe_machine, (options.device,), 120).value
    if isinstance(machine, str):
        raise UserError(machine)
    is_gpu = machine["device"].startswith("cuda")
    size = options.size if options.size != "auto" else "7b" if is_gpu else "tiny"
    counts = is_gpu and size == "7b"
    if not counts:
        print(f"{machine['name']}: {NOTE}.", flush=True)
    result: dict[str, Any] = {"benchmark": "gpu", "medley": __version__, **machine}
    result |= {"size": size, "counts": counts, "note": "" if counts else NOTE, "sections": {}}
    for name in chosen:
        section, limit = SECTIONS[name]
        limit = limit if is_gpu else CPU_SECONDS
        if is_gpu:
            limit = min(limit, int(TOTAL_SECONDS - (time.perf_counter() - start)))
        outcome = run_section(section, machine["device"], size, counts, limit)
        result["sections"][name] = outcome
        print_section(name, outcome)
    figures = [f for one in result["sections"].values() for f in one["figures"]]
    failed = [f["name"] for f in figures if f["passed"] is False]
    errors = [name for name, one in result["sections"].items() if one["error"]]
    result |= {
        "passed": sum(f["passed"] is True for f in figures), "failed": failed, "errors": errors,
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    print(json.dumps(result))


def print_section(name: str, outcome: dict[str, Any]) -> None:
    error = "" if outcome["error"] is None else f", {outcome['error']}"
    print(f"{name}: {outcome['seconds']} s{error}")
    for figure in outcome["figures"]:
        value = "" if figure["value"] is None else f": {figure['value']} {figure['unit']}".rstrip()
        goal = "" if figure["goal"] is None else f" (goal {figure['goal']})"
        verdict = {None: "", True: ", passed", False: ", FAILED"}[figure["passed"]]
        print(f"  {figure['name']}{value}{goal}{verdict}", flush=True)


def describe_machine(send: Callable[[Any], None], name: str) -> None:
    """Sends the hardware and its software, or the reason why the device cannot be used."""
    from medley.inference.devices import resolve_device  # slow to import

    try:
        device = resolve_device(name)
    except UserError as error:
        send(str(error))
        return
    machine: dict[str, Any] = {
        "device": str(device), "name": platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    if device.type == "cuda":
        machine["device"] = f"cuda:{device.index or 0}"
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "name": properties.name, "gigabytes": round(properties.total_memory / 1e9, 1),
            "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
        }  # fmt: skip
    send(machine)


def run_section(section: str, device: str, size: str, counts: bool, limit: int) -> dict[str, Any]:
    """The figures of a section, its seconds, and its error if it did not reach its end."""
    start = time.perf_counter()
    if limit <= 0:
        return {"figures": [], "seconds": 0, "error": "Not started: the time of all is over."}
    outcome = in_process(measure, (section, device, size, counts), limit)
    seconds = round(time.perf_counter() - start, 1)
    figures = [asdict(figure) for figure in outcome.sent]
    return {"figures": figures, "seconds": seconds, "error": outcome.error}


def measure(
    send: Callable[[Any], None], section: str, device: str, size: str, counts: bool
) -> None:
    target = torch.device(device)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    pkgutil.resolve_name(section)(Report(target, size, counts, send))


# --- processes ------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a process has sent, and why it did not reach its end."""

    sent: list[Any] = field(default_factory=list)
    error: str | None = None

    @property
    def value(self) -> Any:
        """The only thing that was sent, or the error."""
        return self.sent[0] if self.sent else self.error


def in_process(function: Callable[..., None], arguments: tuple[Any, ...], limit: float) -> Outcome:
    """Calls a function in a fork of this process, with `send` as its first argument.

    A fork need not import again what this process has imported. It is killed after `limit` seconds.
    """
    assert not torch.cuda.is_initialized(), "a fork could not use CUDA"
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(writer, function, arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
        process.start()
    writer.close()
    outcome = Outcome(error=f"Ended after its limit of {limit} seconds.")
    deadline = time.perf_counter() + limit
    try:
        while reader.poll(max(0, deadline - time.perf_counter())):
            kind, content = reader.recv()
            if kind == "sent":
                outcome.sent.append(content)
            else:
                outcome.error = content
                process.join(5)
                break
    except EOFError:
        process.join(5)
        outcome.error = f"The process ended with status {process.exitcode}."
    finally:
        reader.close()
        if process.is_alive():
            process.kill()
        process.join()
    return outcome


def _call(writer: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    try:
        function(lambda content: writer.send(("sent", content)), *arguments)
        writer.send(("end", None))
    except BaseException as error:  # recorded: the other sections still run
        place = traceback.extract_tb(error.__traceback__)[-1]
        lines = str(error).strip().splitlines() or ["no message"]
        where = f"{Path(place.filename).name}:{place.lineno}"
        writer.send(("end", f"{type(error).__name__}: {lines[0][:300]} ({where})"))


if __name__ == "__main__":
    sys.exit(main())
