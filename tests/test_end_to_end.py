"""The whole way through the programs of the stages, at toy size, as a user would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from PIL import Image

import medley
from medley.checkpoints.adapter import read_adapter
from medley.checkpoints.checkpoint import open_checkpoint
from medley.data.token_dataset import TokenDataset
from medley.tiny.embedded import tiny_folder
from medley.trainer.checkpointing import COMPLETE
from medley.utils.manifest import read_manifest

Run = Callable[..., subprocess.CompletedProcess[str]]
TOKENIZER = tiny_folder() / "tokenizer" / "text_tokenizer.json"


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
    return subprocess.run(
        [*command, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, codes and tokens of a few phantoms, made by the programs."""
    out = tmp_path_factory.mktemp("way")

    def run(*words: object) -> None:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words)],
            cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    run("conversion.draw_phantoms", "--output", out / "data", "--train", 6, "--test", 2)
    done = torchrun(
        "tokenizer.image_tokenization", "--input", out / "data" / "images.csv",
        "--output", out / "codes", "--ckpt", "tiny", "--partition_size", 3, "--bs", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("train", "test"):
        run(
            "tokenizer.tokenize_jsonl", "--input_file", out / "data" / f"{part}.jsonl",
            "--image_codes", out / "codes", "--tokenizer_file", TOKENIZER,
            "--output_file", out / f"{part}.jsonl",
        )  # fmt: skip
    return out


def test_codes_of_two_ranks_are_those_of_the_library(folder: Path) -> None:
    shards = sorted((folder / "codes").glob("partition_*_rank_*.parquet"))
    assert len(shards) == 3  # 8 pictures, 3 a partition
    assert {path.stem[-1] for path in shards} == {"0", "1"}
    tokenizer = medley.ImageTokenizer.from_checkpoint("tiny")
    found: dict[str, list[int]] = {}
    for path in shards:
        table = pq.read_table(path)
        assert str(table.schema.field("img_tokens").type) == (
            f"fixed_size_list<element: uint16>[{tokenizer.codes_per_image}]"
        )
        found |= dict(
            zip(table["img_path"].to_pylist(), table["img_tokens"].to_pylist(), strict=True)
        )
    assert len(found) == 8
    for path, codes in found.items():
        assert tokenizer.encode([Image.open(path)])[0].tolist() == codes
    assert read_manifest(folder / "codes")["token_space"] == tokenizer.fingerprint


def test_tokens_are_those_of_the_library(folder: Path) -> None:
    model = medley.load("tiny", device="cpu")
    lines = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for line in lines[:3]:
        tokens = line.pop("tokens")
        assert tokens == model.encode_document(medley.Document.from_json(line))
    shards = TokenDataset(folder / "test.jsonl")
    assert len(shards) == len(lines)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """An adapter, trained under torchrun and DeepSpeed ZeRO-2."""
    done = torchrun(
        "training.train", "--train_data", folder / "train.jsonl",
        "--val_data", folder / "test.jsonl", "--ckpt", "tiny", "--output_dir", folder / "lora",
        "--ds", "training/deepspeed/zero2.json", "--lora", "--pack", "--max_length", 384,
        "--steps", 4, "--save_steps", 2, "--logging_steps", 1, "--lr", "2e-3", "--lora_r", 4,
        "--eval_steps", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "lora"


def test_training_says_what_it_did(trained: Path) -> None:
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    steps = [row for row in history if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all({"text_loss", "trained_tokens"} <= set(row) for row in steps)
    assert any("image_loss" in row for row in steps)  # not every batch has pictures to draw
    held_out = [row["eval_text_loss"] for row in history if "eval_text_loss" in row]
    assert len(held_out) == 4  # of the same documents, where the steps are of different ones
    assert held_out[-1] < held_out[0]
    assert (trained / "checkpoint-4" / COMPLETE).exists()
    config, tensors = read_adapter(trained)
    assert config["base_model_name_or_path"] == "tiny"
    assert all("lora_" in name for name in tensors)


def test_merge_convert_and_generate(trained: Path, folder: Path, program: Run) -> None:
    said = program(
        "conversion.merge_lora", "--ckpt_path", trained, "--base_path", "tiny",
        "--output_dir", folder / "merged", "--verify",
    ).stdout  # fmt: skip
    assert "largest logit difference" in said
    program(
        "conversion.bin_to_pth", "--trained_ckpt", folder / "merged", "--original_ckpt", "tiny",
        "--new_ckpt", folder / "final", "--verify",
    )  # fmt: skip
    ids = torch.tensor([[0, 8720, 8730]])
    with torch.inference_mode():
        logits = [
            open_checkpoint(folder / name).decoder(torch.float32)(ids).logits
            for name in ("merged", "final")
        ]
        unmerged = medley.load(trained, device="cpu").decoder(input_ids=ids).logits
        base = open_checkpoint("tiny").decoder(torch.float32)(ids).logits
    assert torch.equal(logits[0], logits[1])
    assert torch.allclose(unmerged, logits[0], atol=0.3)
    assert not torch.allclose(base, logits[0], atol=1e-3)
    program(
        "medley.cli", "generate", "--ckpt", folder / "final", "--prompt", "Show me a CT scan.",
        "--mode", "image", "--output", folder / "answers", "--html",
    )  # fmt: skip
    row = json.loads((folder / "answers" / "responses.jsonl").read_text())
    size = open_checkpoint("tiny").image_tokenizer().size
    with Image.open(folder / "answers" / row["parts"][0]["file"]) as image:
        assert np.asarray(image).shape == (size, size, 3)
    assert "<img" in (folder / "answers" / "index.html").read_text()


def test_pth_to_bin_of_tiny(folder: Path, program: Run) -> None:
    program(
        "conversion.pth_to_bin", "--input_dir", "tiny", "--output_dir", folder / "hf", "--verify"
    )
    assert open_checkpoint(folder / "hf").fingerprint() == open_checkpoint("tiny").fingerprint()


def test_another_token_space_is_refused(folder: Path, program: Run, tmp_path: Path) -> None:
    other = ROOT / "tests" / "golden" / "checkpoints" / "chameleon_7b_layout" / "input"
    codes = tmp_path / "train.jsonl"
    codes.write_bytes((folder / "train.jsonl").read_bytes())
    manifest = folder / "train.jsonl.manifest.json"
    (tmp_path / manifest.name).write_bytes(manifest.read_bytes())
    said = program(
        "training.train", "--train_data", codes, "--ckpt", other, "--output_dir", tmp_path / "out",
        status=2,
    ).stderr  # fmt: skip
    assert "its image codes come from another VQGAN" in said
    assert str(manifest.name) in said
    assert not (tmp_path / "out").exists()


# --- bad input ----------------------------------------------------------------------------


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a user sees; no traceback with it."""
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_broken_and_missing_pictures_are_named_and_nothing_else_is_lost(
    program: Run, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8), "gray").save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "list.csv").write_text(
        f"img_path\n{tmp_path}/good.png\n{tmp_path}/broken.png\n{tmp_path}/missing.png\n"
    )
    words: list[Any] = ["tokenizer.image_tokenization", "--input", tmp_path / "list.csv"]
    words += ["--output", tmp_path / "codes", "--ckpt", "tiny"]
    said = last_line(program(*words, status=3))
    assert "2 images of 3 rows could not be read" in said
    errors = [
        json.loads(line)
        for line in (tmp_path / "codes" / "errors_rank_0.jsonl").read_text().splitlines()
    ]
    assert [Path(e["img_path"]).name for e in errors] == ["broken.png", "missing.png"]
    assert all(Path(e["img_path"]).name in e["error"] for e in errors)
    table = pq.read_table(tmp_path / "codes" / "partition_0_rank_0.parquet")
    assert table["img_path"].to_pylist() == [f"{tmp_path}/good.png"]
    program(*words, "--allow_errors")  # started again: nothing is done twice, the same count
    said = last_line(program(*words, "--partition_size", 7, status=2))
    assert "partition_size" in said


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("models/tiny/consolidated.pth", "consolidated.pth"),
        ("models/tiny/params.json", "params.json: no such file"),
        ("tokenizer/vqgan.ckpt", "vqgan.ckpt: no such file"),
        ("tokenizer/vqgan.yaml", "vqgan.yaml: no such file"),
        ("tokenizer/text_tokenizer.json", "text_tokenizer.json: no such tokenizer file"),
    ],
)
def test_a_checkpoint_with_a_file_missing_is_named(
    program: Run, tmp_path: Path, missing: str, message: str
) -> None:
    import shutil

    shutil.copytree(tiny_folder(), tmp_path / "ckpt")
    (tmp_path / "ckpt" / missing).unlink()
    said = last_line(
        program(
            "conversion.pth_to_bin",
            "--input_dir",
            tmp_path / "ckpt",
            "--output_dir",
            tmp_path / "hf",
            status=2,
        )
    )
    assert message in said
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def test_unknown_flags_and_recipe_keys_are_refused(program: Run, tmp_path: Path) -> None:
    said = last_line(program("training.train", "--no_such_flag", "1", status=2))
    assert "no_such_flag" in said
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1\n")
    said = last_line(
        program(
            "training.train",
            "--config",
            tmp_path / "recipe.yaml",
            "--train_data",
            "x",
            "--ckpt",
            "tiny",
            "--output_dir",
            tmp_path / "out",
            status=2,
        )
    )
    assert "learning_rate" in said
    said = last_line(program("medley.cli", "draw", status=2))
    assert said.startswith("medley: no command 'draw', there is generate, chat, answer, ")


def test_an_existing_output_is_not_overwritten(program: Run, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("keep me")
    said = last_line(
        program(
            "conversion.pth_to_bin",
            "--input_dir",
            "tiny",
            "--output_dir",
            tmp_path / "hf",
            status=2,
        )
    )
    assert "already exists" in said
    assert (tmp_path / "hf" / "mine.txt").read_text() == "keep me"


def test_a_max_length_below_one_picture_is_refused(
    folder: Path, program: Run, tmp_path: Path
) -> None:
    words = ["training.train", "--train_data", folder / "train.jsonl", "--ckpt", "tiny"]
    said = last_line(program(*words, "--output_dir", tmp_path / "o", "--max_length", 40, status=2))
    assert "one whole picture needs 68" in said


def test_an_untrained_adapter_is_refused(program: Run, tmp_path: Path) -> None:
    import peft

    decoder = open_checkpoint("tiny").decoder(torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(decoder, config).save_pretrained(tmp_path / "adapter")
    words = ["conversion.merge_lora", "--ckpt_path", tmp_path / "adapter", "--base_path", "tiny"]
    said = last_line(program(*words, "--output_dir", tmp_path / "merged", status=2))
    assert "never trained" in said
    assert not (tmp_path / "merged").exists()
