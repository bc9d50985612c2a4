"""The program, on drawn pictures and on real ones."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from medley import ImageTokenizer
from medley.errors import UserError
from medley.inference.loading import load
from medley.phantoms import Phantom
from medley.vqgan import VQGAN, VQGANConfig
from medley.vqgan.files import read_vqgan, write_vqgan
from medley.vqgan.image_tokenizer import token_space_fingerprint

PROGRAM = "tokenizer.finetune_vqgan"
DATA = ROOT.parent / "shared" / "data"


def drawn(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Phantom.random(rng).image(64) for _ in range(count)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VQGAN of random weights, beside twenty drawn pictures, one of them broken."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    write_vqgan(folder / "vqgan", VQGAN(VQGANConfig(32, (1, 2), 1, 32, 16, 16, 128)), "pad")
    (folder / "pictures").mkdir()
    for i, image in enumerate(drawn(20)):
        image.save(folder / "pictures" / f"{i:02}.png")
    (folder / "pictures" / "07.png").write_bytes(b"torn")
    return folder


def flags(small: Path, output: Path, steps: int) -> list[object]:
    return [
        "--input", small / "pictures", "--ckpt", small / "vqgan", "--output", output,
        "--steps", steps, "--bs", 4, "--eval_steps", 5, "--val_share", 0.2, "--lr", 2e-4,
        "--discriminator_start", 12, "--discriminator_warmup", 5, "--device", "cpu",
    ]  # fmt: skip


def log(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_to_the_very_same_weights(
    small: Path, tmp_path: Path, program: Callable[..., Any]
) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    done = program(PROGRAM, *flags(small, whole, 25), status=3)
    assert "ANOTHER TOKEN SPACE" in done.stdout
    assert "1 pictures could not be read" in done.stderr
    assert "07.png" in (whole / "errors.jsonl").read_text()

    command = [sys.executable, "-m", PROGRAM, *map(str, flags(small, torn, 25))]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (torn / "grids" / "step_000010.png").exists():
        assert job.poll() is None
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (torn / "tokenizer").exists()
    done = program(PROGRAM, *flags(small, torn, 25), "--seed", 1, status=2)
    assert "holds a run with seed 0, this one has 1" in done.stderr
    (torn / "tokenizer").mkdir()  # as a kill at the very end may leave it
    done = program(PROGRAM, *flags(small, torn, 25), "--allow_errors")
    assert "going on after step" in done.stdout
    one, other = (read_vqgan(f / "tokenizer")[0].state_dict() for f in (whole, torn))
    assert all(torch.equal(one[name], other[name]) for name in one)

    entries = log(whole)
    assert [e["step"] for e in entries] == [0, 5, 10, 15, 20, 25]
    assert entries[-1]["val_psnr"] > entries[0]["val_psnr"] + 1
    assert "discriminator" not in entries[1]  # learns from step 7, counts from step 12
    assert "discriminator" in entries[2]
    assert "adversarial" not in entries[2]
    assert entries[3]["adversarial_weight"] > 0
    assert read_vqgan(whole / "tokenizer")[1] == "pad"
    done = program(PROGRAM, *flags(small, whole, 25), status=2)
    assert "holds a finished VQGAN" in done.stderr


def test_training_the_decoder_only_changes_no_code(
    small: Path, tmp_path: Path, program: Callable[..., Any]
) -> None:
    output = tmp_path / "out"
    more = ["--trainable", "decoder", "--allow_errors"]
    done = program(PROGRAM, *flags(small, output, 5), *more)
    assert "The token space is the same" in done.stdout
    before = read_vqgan(small / "vqgan")[0]
    after = read_vqgan(output / "tokenizer")[0]
    assert token_space_fingerprint(before) == token_space_fingerprint(after)
    changed = [
        n for n, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[n])
    ]
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data beside the project are not here")
@pytest.mark.parametrize("name", ["vqa_rad", "bccd"])
def test_real_pictures_become_clearer_and_the_result_loads_everywhere(
    name: str, tmp_path: Path, program: Callable[..., Any]
) -> None:
    output = tmp_path / "out"
    program(
        PROGRAM, "--input", DATA / name / "images", "--ckpt", "tiny", "--output", output,
        "--steps", 12, "--bs", 8, "--eval_steps", 6, "--n_limit", 60, "--lr", 1e-4,
    )  # fmt: skip
    entries = log(output)
    assert entries[-1]["val_psnr"] > entries[0]["val_psnr"] + 0.5
    tokenizer = ImageTokenizer.from_checkpoint(output)
    codes = tokenizer.encode([drawn(1)[0]])
    assert tokenizer.decode(codes)[0].size == (64, 64)
    with pytest.raises(UserError, match="speaks other codes"):
        load("tiny", vqgan=output)
