"""Fine-tuning a VQGAN on synthetic and on real images."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TIMEOUT, torchrun_command
from PIL import Image

from medley import ImageTokenizer
from medley.commands.finetune_vqgan import FinetuneVqganOptions, identify_run, start_run
from medley.errors import UserError
from medley.images.image_source import ImageSource
from medley.images.preprocess import Preprocessing
from medley.inference.loading import load
from medley.phantoms import Phantom
from medley.utils.manifest import read_manifest, write_manifest
from medley.vqgan import VQGAN, VQGANConfig
from medley.vqgan.files import read_vqgan, write_vqgan
from medley.vqgan.image_tokenizer import token_space_fingerprint

PROGRAM = "tokenizer.finetune_vqgan"
PREPROCESSING = Preprocessing("pad")
DATA = ROOT.parent / "shared" / "data"


def phantom_images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Phantom.random(rng).image(64) for _ in range(count)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small VQGAN of random weights and 20 images, one of them damaged."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    write_vqgan(folder / "vqgan", VQGAN(VQGANConfig(32, (1, 2), 1, 32, 16, 16, 128)), PREPROCESSING)
    (folder / "images").mkdir()
    for i, image in enumerate(phantom_images(20)):
        image.save(folder / "images" / f"{i:02}.png")
    (folder / "images" / "07.png").write_bytes(b"damaged")
    return folder


def flags(small: Path, output: Path, steps: int) -> list[object]:
    return [
        "--input", small / "images", "--ckpt", small / "vqgan", "--output", output,
        "--steps", steps, "--bs", 4, "--eval_steps", 5, "--val_fraction", 0.2, "--lr", 2e-4,
        "--discriminator_start", 12, "--discriminator_warmup", 5, "--device", "cpu",
    ]  # fmt: skip


def log(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.mark.hostile(repeat=3)
def test_a_killed_run_resumes_with_identical_weights(
    small: Path, tmp_path: Path, program: Callable[..., Any]
) -> None:
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    done = program(PROGRAM, *flags(small, complete, 25), status=3)
    assert "NEW TOKEN SPACE" in done.stdout
    assert "1 images could not be read" in done.stderr
    assert "07.png" in (complete / "errors.jsonl").read_text()

    command = [sys.executable, "-m", PROGRAM, *map(str, flags(small, killed, 25))]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "grids" / "step_000010.png").exists():
        assert job.poll() is None
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (killed / "tokenizer").exists()
    done = program(PROGRAM, *flags(small, killed, 25), "--seed", 1, status=2)
    assert "seed was 0, now 1" in done.stderr
    (killed / "tokenizer").mkdir()  # a run killed in its last save may leave it
    done = program(PROGRAM, *flags(small, killed, 25), "--on_error", "skip")
    assert "resuming after step" in done.stdout
    one, other = (read_vqgan(f / "tokenizer")[0].state_dict() for f in (complete, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)

    entries = log(complete)
    assert [e["step"] for e in entries] == [0, 5, 10, 15, 20, 25]
    assert entries[-1]["val_psnr"] > entries[0]["val_psnr"] + 1
    assert "discriminator" not in entries[1]  # trained from step 7, part of the loss from step 12
    assert "discriminator" in entries[2]
    assert "adversarial" not in entries[2]
    assert entries[3]["adversarial_weight"] > 0
    assert read_vqgan(complete / "tokenizer")[1] == Preprocessing("pad", exif_orientation=True)
    done = program(PROGRAM, *flags(small, complete, 25), status=2)
    assert "Contains a finished VQGAN" in done.stderr


@pytest.mark.slow
def test_two_ranks_train_like_one(small: Path, tmp_path: Path, program: Callable[..., Any]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    program(PROGRAM, *flags(small, one, 4), "--on_error", "skip")
    words = flags(small, two, 4)
    words[words.index("--bs") + 1] = 2
    command = torchrun_command(PROGRAM, *words, "--on_error", "skip")
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr[:3000]
    start, *results = (
        read_vqgan(folder)[0].state_dict()
        for folder in (small / "vqgan", one / "tokenizer", two / "tokenizer")
    )
    # Not the biases: behind a group norm their gradient is rounding alone, which Adam magnifies.
    names = [name for name, weight in start.items() if weight.ndim == 4]

    def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return sum(float((one[name] - other[name]).abs().sum()) for name in names)

    assert difference(results[0], results[1]) < 0.1 * difference(results[0], start)
    psnr = [log(folder)[-1]["val_psnr"] for folder in (one, two)]
    assert psnr[0] == pytest.approx(psnr[1], abs=0.05)


def test_a_run_of_the_previous_release_can_be_resumed(small: Path, tmp_path: Path) -> None:
    images = [ImageSource(name, name) for name in ("a.png", "b.png")]
    options = FinetuneVqganOptions(input=small / "images", output=tmp_path, ckpt="tiny")
    identity = identify_run(options, images, "0123", PREPROCESSING)
    recorded = {
        "trainable": "all", "bs": 4, "seed": 0, "val_share": 0.1, "commitment": 0.25,  # alias
        "perceptual_weight": 1.0, "discriminator_start": None, "discriminator_warmup": 500,
        "discriminator_weight": 0.8, "pictures": 2, "ranks": 1, "perceptual": None,  # alias
        "token_space_before": "0123", "names": identity["image_names_hash"],
    }  # fmt: skip
    write_manifest(tmp_path, {}, [], None, run=recorded)
    with pytest.warns(UserWarning, match="did not record lr, vqgan"):
        start_run(options, identity, PREPROCESSING)
    assert read_manifest(tmp_path)["run"] == identity
    with pytest.raises(UserError, match="images was 2, now 1"):
        start_run(options, identify_run(options, images[:1], "0123", PREPROCESSING), PREPROCESSING)


def test_output_that_is_not_a_run_is_refused_and_stays(tmp_path: Path) -> None:
    options = FinetuneVqganOptions(input=tmp_path, output=tmp_path / "ckpt", ckpt="tiny")
    identity = identify_run(options, [], "0123", PREPROCESSING)
    for name in ("tokenizer/vqgan.ckpt", "config.json"):
        (tmp_path / "ckpt" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ckpt" / name).write_text("the user's")
    for manifest in (None, {"run": {"seed": 0}}, {"run": None, "token_space": None}):
        if manifest is not None:
            (tmp_path / "ckpt" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="Is not empty and has no manifest"):
            start_run(options, identity, PREPROCESSING)
    write_manifest(tmp_path / "ckpt", {}, [], None, run=identity)
    (tmp_path / "ckpt" / "tokenizer" / "text_tokenizer_notes.txt").touch()
    with pytest.raises(UserError, match=r"no fine-tuning run writes \(text_tokenizer_notes"):
        start_run(options, identity, PREPROCESSING)
    assert (tmp_path / "ckpt" / "tokenizer" / "vqgan.ckpt").read_text() == "the user's"


def test_resuming_with_another_learning_rate_or_vqgan_is_refused(tmp_path: Path) -> None:
    options = FinetuneVqganOptions(input=tmp_path, output=tmp_path / "out", ckpt="tiny")
    identity = identify_run(options, [], "0123", PREPROCESSING, "one")
    start_run(options, identity, PREPROCESSING)
    with pytest.raises(UserError, match=r"lr was 5e-05, now 0\.1; vqgan was 'one', now 'other'"):
        start_run(options, {**identity, "lr": 0.1, "vqgan": "other"}, PREPROCESSING)
    anyway = replace(options, resume_anyway=["lr"])
    start_run(anyway, {**identity, "lr": 0.1}, PREPROCESSING)
    assert read_manifest(options.output)["run"]["lr"] == 0.1
    with pytest.raises(UserError, match="--resume_anyway nothing: No such field"):
        start_run(replace(options, resume_anyway=["nothing"]), identity, PREPROCESSING)


def test_training_only_the_decoder_changes_no_code(
    small: Path, tmp_path: Path, program: Callable[..., Any]
) -> None:
    output = tmp_path / "out"
    more = ["--trainable", "decoder", "--on_error", "skip"]
    done = program(PROGRAM, *flags(small, output, 5), *more)
    assert "The token space is unchanged" in done.stdout
    before = read_vqgan(small / "vqgan")[0]
    after = read_vqgan(output / "tokenizer")[0]
    assert token_space_fingerprint(before) == token_space_fingerprint(after)
    changed = [
        n for n, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[n])
    ]
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)


@pytest.mark.skipif(
    not DATA.is_dir(),
    reason="needs real images in ../shared/data, which is not part of the repository",
)
@pytest.mark.parametrize("name", ["vqa_rad", "bccd"])
def test_finetuning_improves_real_images_and_the_result_loads(
    name: str, tmp_path: Path, program: Callable[..., Any]
) -> None:
    output = tmp_path / "out"
    program(
        PROGRAM, "--input", DATA / name / "images", "--ckpt", "tiny", "--output", output,
        "--steps", 12, "--bs", 8, "--eval_steps", 6, "--limit", 60, "--lr", 1e-4,
    )  # fmt: skip
    entries = log(output)
    assert entries[-1]["val_psnr"] > entries[0]["val_psnr"] + 0.5
    tokenizer = ImageTokenizer.from_checkpoint(output)
    codes = tokenizer.encode([phantom_images(1)[0]])
    assert tokenizer.decode(codes)[0].size == (64, 64)
    with pytest.raises(UserError, match="another token space"):
        load("tiny", vqgan=output)
