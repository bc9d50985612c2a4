"""benchmarks/gpu.py at tiny size on the CPU: every section runs, and every comparison passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from conftest import ROOT

from medley.generation.kv_cache import bytes_per_token
from medley.generation.model_runner import BRANCHES
from medley.inference.memory import MemoryEstimate

PROGRAM = ROOT / "benchmarks" / "gpu.py"
SECTIONS = {"vqgan", "decode", "images", "lora", "faults", "kernels", "merge", "quantized"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
def test_all_sections_run_at_tiny_size() -> None:
    done = run("--device", "cpu")
    result = last_line(done)
    assert set(result["sections"]) == SECTIONS
    assert result["errors"] == result["failed"] == [], done.stdout
    assert not result["counts"]
    assert "no speed counts" in done.stdout
    figures = {f["name"]: f for s in result["sections"].values() for f in s["figures"]}
    # Goals are named on every device, and judged on a GPU with the whole model only.
    assert figures["step at batch 1"]["goal"] == 5.0
    assert figures["step at batch 1"]["passed"] is None
    assert figures["guided image at batch 1"]["goal"] == 5.6
    assert figures["LoRA with checkpointing"]["goal"] == 20_000
    for name in (
        "float32 codes equal those of the CPU", "the request without memory ends",
        "the other request continues", "the same images in two threads", "merged logits are close",
        "4bit feed-forward block is close", "sdpa gradient equals that of sdpa",
    ):  # fmt: skip
        assert figures[name]["passed"] is True, name
    assert figures["flash"]["value"].startswith("not here: ")


def test_a_section_that_fails_is_recorded_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = import_program(monkeypatch)
    outcomes = {
        name: gpu.in_process(function, (), 60)
        for name, function in (("good", send_two), ("bad", fail), ("crash", crash))
    }
    assert (outcomes["good"].sent, outcomes["good"].error) == ([1, 2], None)
    assert outcomes["bad"].sent == [1]
    assert outcomes["bad"].error.startswith("ValueError: a section that fails (test_gpu_bench")
    assert outcomes["crash"].sent == [1]
    assert outcomes["crash"].error == "The process ended with status 9."


def test_a_section_that_hangs_is_ended_and_keeps_its_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome = import_program(monkeypatch).in_process(hang, (), 2)
    assert outcome.sent == [1]
    assert outcome.error == "Ended after its limit of 2 seconds."


@pytest.mark.parametrize(
    ("value", "limits", "passed"),
    [
        (5.0, {"at_most": 5.0}, True), (5.1, {"at_most": 5.0}, False),
        (122.0, {"at_least": 122.0}, True), (121.0, {"at_least": 122.0}, False),
        (float("nan"), {"at_least": 1.0}, False), (None, {"at_most": 1.0}, False), (1.0, {}, None),
    ],
)  # fmt: skip
def test_goals(
    monkeypatch: pytest.MonkeyPatch, value: Any, limits: dict[str, float], passed: bool | None
) -> None:
    gpu = import_program(monkeypatch)
    for counts in (True, False):
        sent: list[Any] = []
        gpu.Report("cpu", "tiny", counts, sent.append).add("a", value, "s", **limits)
        assert sent[0].passed is (passed if counts else None)
        assert sent[0].goal == next(iter(limits.values()), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "vqgan,nothing"], "No such section (got nothing, expected some of vqgan"),
        (["--device", "cuda:77"], "--device cuda:77: "),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line


def test_the_paper_figures_of_the_docs_follow_from_the_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import_program(monkeypatch)
    import gpu_generation
    import random_models

    text = (ROOT / "docs" / "gpu.md").read_text()
    size = random_models.SIZES["7b"]
    config, cuda = random_models.make_config(size), torch.device("cuda")
    rows = {None: "bfloat16", "8bit": "`--quantize 8bit`", "4bit": "`--quantize 4bit`"}
    per_token = bytes_per_token(config, torch.bfloat16)
    guided = BRANCHES * config.max_position_embeddings * per_token
    for kind, name in rows.items():
        weights = MemoryEstimate.of(config, torch.bfloat16, kind, cuda).weights  # type: ignore[arg-type]
        room = [int(0.9 * (card * 1e9 - weights - 0.8e9) // guided) for card in (24, 48, 80)]
        assert f"| {name} | {weights / 1e9:.1f} GB | {room[0]} | {room[1]} | {room[2]} |" in text
    assert f"= {per_token / 1e3:.0f} kB for each token" in text
    assert f"{guided / 1e9:.2f} GB" in text
    operations = gpu_generation.encoder_operations(size.vqgan)
    assert f"takes {operations / 1e12:.3f} TFLOP" in text
    assert f"at most {67e12 / operations:.0f} and {989e12 / operations:,.0f} images/s" in text
    read = random_models.num_weights(size.decoder) - config.vocab_size * config.hidden_size
    for bandwidth in (1.01, 0.86, 2.04, 3.35):
        step = 2 * read / bandwidth / 1e12
        assert f"| {bandwidth} TB/s | {1e3 * step:.1f} ms | {1024 * step:.1f} s |" in text


def import_program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, whose processes import this one: pytest has no CUDA to protect."""
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import gpu

    return gpu


def send_two(send: Any) -> None:
    send(1)
    send(2)


def fail(send: Any) -> None:
    send(1)
    raise ValueError("a section that fails\nwith details")


def crash(send: Any) -> None:
    send(1)
    os._exit(9)


def hang(send: Any) -> None:
    send(1)
    time.sleep(600)
