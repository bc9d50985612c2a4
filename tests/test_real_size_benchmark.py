"""benchmarks/real_size.py: all steps at 1/64, and the checks before them."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

PROGRAM = ROOT / "benchmarks" / "real_size.py"
STEPS = ["pth_to_bin", "bin_to_pth", "merge", "tokenize", "encode", "words", "train", "int8",
         "int4", "answer"]  # fmt: skip


def test_every_step_is_tested(program: Any) -> None:
    assert list(program.STEPS) == STEPS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "layers"),
    # A decoder of 8 layers computes too slowly in bfloat16 on CPUs without such instructions.
    [(["pth_to_bin", "bin_to_pth", "merge", "tokenize", "encode"], 8), (STEPS[5:], 1)],
)
def test_all_steps_at_a_64th(tmp_path: Path, steps: list[str], layers: int) -> None:
    done = run(
        "--scale", "1/64", "--layers", str(layers), "--steps", ",".join(steps),
        "--documents", "20", "--images", "2", "--answer_layers", "1", "--folder", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result["steps"]) == steps
    assert (result["layers"], result["width"]) == (layers, 1024)
    for name, step in result["steps"].items():
        assert step["seconds"] > 0, name
        assert 0.05 < step["anonymous_gb"] <= step["resident_gb"] + 0.1, name
        assert "baseline_seconds" not in step  # that is for the whole size
    assert f"GB available (estimates: {steps[0]}" in done.stdout
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "new_pth").exists()


def test_a_step_that_fails_is_recorded(tmp_path: Path) -> None:
    """The limit ends the command, and the next step runs."""
    done = run(
        "--steps", "pth_to_bin,tokenize", "--layers", "1", "--width", "128", "--scale", "1/64",
        "--documents", "1", "--limit", "0.2", "--folder", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 3
    steps = json.loads(done.stdout.splitlines()[-1])["steps"]
    assert steps["pth_to_bin"] == {"error": "Ended after its limit of 0.2 seconds."}
    assert list(steps) == ["pth_to_bin", "tokenize"]
    assert "These steps failed: pth_to_bin" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "2"], "--scale: Out of range (got 2, expected a fraction such as 1/64)"),
        (["--scale", "half"], "--scale: Out of range (got half, "),
        (["--steps", "words,sleep"], "--steps: No such step (got sleep, expected some of"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import real_size

    return real_size


@pytest.mark.parametrize(("memory", "disk"), [(1, 10**15), (10**15, 1)])
def test_a_machine_that_is_too_small_is_refused(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, disk: int
) -> None:
    class Free:
        available, free = memory, disk

    monkeypatch.setattr(program.psutil, "virtual_memory", lambda: Free)
    monkeypatch.setattr(program.shutil, "disk_usage", lambda path: Free)
    work = program.Work(program.Options(), program.SIZES["7b"], tmp_path)
    with pytest.raises(program.UserError, match="This machine is too small: ") as error:
        program.check_machine(work, STEPS)
    assert "\n" not in str(error.value)
    assert ("no step exceeds" in str(error.value)) == (disk == 1)


def test_sizes(program: Any) -> None:
    sizes = program.SIZES
    # The published sizes: 7.04 and 34.3 billion weights.
    assert program.num_weights(sizes["7b"].decoder) == pytest.approx(7.01e9, rel=0.01)
    assert program.num_weights(sizes["34b"].decoder) == pytest.approx(34.3e9, rel=0.01)
    for name in ("7b", "34b"):
        small = program.scaled(sizes[name], Fraction(1, 64)).decoder
        assert small.layers == sizes[name].decoder.layers / 4
        assert small.heads % small.key_value_heads == small.key_value_heads % small.shards == 0
        assert small.width // small.heads == 128
    narrow = program.resized(sizes["7b"], 2, 256).decoder
    assert (narrow.layers, narrow.width, narrow.heads) == (2, 256, 2)
