"""Weight deltas in LLaVA's format: recorded cases, and both commands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden
from safetensors.torch import load_file, save_file
from torch import Tensor

from medley.checkpoints.deltas import add_base, subtract_base
from medley.errors import UserError

CASES = golden("llava_delta.json")["cases"]


def tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    def numbers(value: Any) -> Any:  # the file contains infinity as the string "inf"
        return [numbers(v) for v in value] if isinstance(value, list) else float(value)

    return {n: torch.tensor(numbers(v), dtype=torch.float16) for n, v in values.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_deltas_equal_recorded_cases(case: Any, exceptions: dict[str, dict[str, str]]) -> None:
    given, applied = case["input"], case["op"] == "apply_delta"
    base = tensors(given["base"])
    own = tensors(given["delta" if applied else "target"])
    combine = add_base if applied else subtract_base
    is_error = case["id"] in exceptions["llava_delta"]
    if case["expected"]["exception"] is not None or is_error:
        reason = (
            "NaN or infinite" if is_error else "does not have this tensor|Wrong shape in the base"
        )
        with pytest.raises(UserError, match=reason):
            [combine(name, tensor, base.get(name)) for name, tensor in own.items()]
        return
    expected = tensors(case["expected"]["target" if applied else "delta"])
    found = {name: combine(name, tensor, base.get(name)) for name, tensor in own.items()}
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])
        assert tensor.dtype == torch.float16


def write(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_make_and_apply_delta_are_inverse(tmp_path: Path, program: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    old = {"lm_head.weight": torch.randn(3, 2), "a": torch.randn(4)}
    new = {"lm_head.weight": torch.randn(5, 2), "a": torch.randn(4)}
    base, target = write(tmp_path / "base", old), write(tmp_path / "target", new)
    (target / "license.txt").write_text("Apache")
    flags = ["--base", base, "--target", target, "--delta", tmp_path / "delta"]
    program("conversion.make_delta", *flags)
    flags[3] = tmp_path / "again"
    program("conversion.apply_delta", *flags)
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in new.items():
        assert torch.allclose(again[name], tensor, atol=1e-6)
    assert (tmp_path / "again" / "license.txt").read_text() == "Apache"
    done = program("conversion.apply_delta", *flags, status=2)
    assert "already exists" in done.stderr


def test_missing_tensors_are_named_or_copied(tmp_path: Path, program: Callable[..., Any]) -> None:
    base = write(tmp_path / "base", {"a": torch.ones(2), "b": torch.full((2,), math.pi)})
    delta = write(tmp_path / "delta", {"a": torch.ones(2)})
    flags = ["--base", base, "--delta", delta, "--target", tmp_path / "out"]
    done = program("conversion.apply_delta", *flags, status=2)
    assert "1 tensors of the base are missing: b" in done.stderr
    assert not (tmp_path / "out").exists()
    program("conversion.apply_delta", *flags, "--copy_missing", "--dtype", "bfloat16")
    flags[-1] = tmp_path / "deprecated"
    done = program("conversion.apply_delta", *flags, "--take_missing")  # alias
    assert "--take_missing is deprecated, use --copy_missing" in done.stderr  # alias
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert out["a"].tolist() == [2, 2]
    assert out["b"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["options"]["copy_missing"]
