"""The programs of all stages at toy size, run in subprocesses as a user runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import torch
from conftest import GOLDEN, ROOT, TIMEOUT, torchrun_command
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
# One worker of pytest-xdist runs all of them: they share the module's fixtures.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("end_to_end")]


def torchrun(module: str, *flags: object) -> None:
    """Runs a module on two ranks."""
    done = subprocess.run(
        torchrun_command(module, *flags),
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(program: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, image codes and tokens of a few phantoms, made by the programs."""
    out = tmp_path_factory.mktemp("stages")
    program("conversion.draw_phantoms", "--output", out / "data", "--train", 6, "--test", 2)
    torchrun(
        "tokenizer.image_tokenization", "--input", out / "data" / "images.csv",
        "--output", out / "codes", "--ckpt", "tiny", "--partition_size", 3, "--bs", 2,
    )  # fmt: skip
    for split in ("train", "test"):
        program(
            "tokenizer.tokenize_jsonl", "--input_file", out / "data" / f"{split}.jsonl",
            "--image_codes", out / "codes", "--tokenizer_file", TOKENIZER,
            "--output_file", out / f"{split}.jsonl",
        )  # fmt: skip
    return out


def test_image_codes_of_two_ranks_equal_those_of_the_library(folder: Path) -> None:
    parts = sorted((folder / "codes").glob("partition_*_rank_*.parquet"))
    assert len(parts) == 3  # 8 images, 3 in a partition
    assert {path.stem[-1] for path in parts} == {"0", "1"}
    tokenizer = medley.ImageTokenizer.from_checkpoint("tiny")
    codes_by_path: dict[str, list[int]] = {}
    for part in parts:
        table = pq.read_table(part)
        assert str(table.schema.field("img_tokens").type) == (
            f"fixed_size_list<element: uint16>[{tokenizer.codes_per_image}]"
        )
        columns = (table["img_path"].to_pylist(), table["img_tokens"].to_pylist())
        codes_by_path |= dict(zip(*columns, strict=True))
    assert len(codes_by_path) == 8
    for path, codes in codes_by_path.items():
        assert tokenizer.encode([Image.open(path)])[0].tolist() == codes
    assert read_manifest(folder / "codes")["token_space"] == tokenizer.fingerprint


def test_token_sequences_equal_those_of_the_library(folder: Path, tiny_model: medley.Model) -> None:
    lines = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for line in lines[:3]:
        tokens = line.pop("tokens")
        assert tokens == tiny_model.encode_document(medley.Document.from_json(line))
    assert len(TokenDataset(folder / "test.jsonl")) == len(lines)


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """An adapter, trained on two ranks under DeepSpeed ZeRO-2."""
    torchrun(
        "training.train", "--train_data", folder / "train.jsonl",
        "--val_data", folder / "test.jsonl", "--ckpt", "tiny", "--output_dir", folder / "lora",
        "--ds", "training/deepspeed/zero2.json", "--lora", "--pack", "--max_length", 384,
        "--steps", 4, "--save_steps", 2, "--logging_steps", 1, "--lr", "2e-3", "--lora_r", 4,
        "--eval_steps", 1,
    )  # fmt: skip
    return folder / "lora"


def test_training_lowers_the_validation_loss_and_saves_an_adapter(adapter: Path) -> None:
    history = json.loads((adapter / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert all({"text_loss", "trained_tokens"} <= set(entry) for entry in steps)
    assert any("image_loss" in entry for entry in steps)  # not every batch has generated images
    # The training losses are of different documents at each step, and say less.
    validation = [entry["eval_text_loss"] for entry in history if "eval_text_loss" in entry]
    assert len(validation) == 4
    assert validation[-1] < validation[0]
    assert (adapter / "checkpoint-4" / COMPLETE).exists()
    config, tensors = read_adapter(adapter)
    assert config["base_model_name_or_path"] == "tiny"
    assert all("lora_" in name for name in tensors)


def test_adapter_is_merged_converted_and_generates_an_image(
    adapter: Path, folder: Path, program: Run
) -> None:
    merge = program(
        "conversion.merge_lora", "--ckpt_path", adapter, "--base_path", "tiny",
        "--output_dir", folder / "merged", "--verify",
    )  # fmt: skip
    assert "logit difference" in merge.stdout
    program(
        "conversion.bin_to_pth", "--trained_ckpt", folder / "merged", "--original_ckpt", "tiny",
        "--new_ckpt", folder / "final", "--verify",
    )  # fmt: skip
    ids = torch.tensor([[0, 8720, 8730]])
    with torch.inference_mode():
        merged, final, base = (
            open_checkpoint(name).decoder(torch.float32)(ids).logits
            for name in (folder / "merged", folder / "final", "tiny")
        )
        unmerged = medley.load(adapter, device="cpu").decoder(input_ids=ids).logits
    assert torch.equal(merged, final)
    assert torch.allclose(unmerged, merged, atol=0.3)
    assert not torch.allclose(base, merged, atol=1e-3)
    program(
        "medley", "generate", "--ckpt", folder / "final", "--prompt", "Show me a CT scan.",
        "--mode", "image", "--output", folder / "responses", "--html_report",
    )  # fmt: skip
    row = json.loads((folder / "responses" / "responses.jsonl").read_text())
    size = open_checkpoint("tiny").image_tokenizer().size
    with Image.open(folder / "responses" / row["parts"][0]["file"]) as image:
        assert np.asarray(image).shape == (size, size, 3)
    assert "<img" in (folder / "responses" / "index.html").read_text()


def test_pth_to_bin_keeps_the_token_space(program: Run, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    program("conversion.pth_to_bin", "--input_dir", "tiny", "--output_dir", target, "--verify")
    assert open_checkpoint(target).fingerprint() == open_checkpoint("tiny").fingerprint()


def test_training_on_another_token_space_is_refused(
    folder: Path, program: Run, tmp_path: Path
) -> None:
    other = GOLDEN / "checkpoints" / "chameleon_7b_layout" / "input"
    manifest = "train.jsonl.manifest.json"
    for name in ("train.jsonl", manifest):
        shutil.copy(folder / name, tmp_path)
    error = program(
        "training.train", "--train_data", tmp_path / "train.jsonl", "--ckpt", other,
        "--output_dir", tmp_path / "out", status=2,
    ).stderr  # fmt: skip
    assert "its image codes come from another VQGAN" in error
    assert manifest in error
    assert not (tmp_path / "out").exists()


# --- bad input ----------------------------------------------------------------------------


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last line on stderr; there must be no traceback."""
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_unreadable_images_are_listed_and_the_others_are_tokenized(
    program: Run, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8), "gray").save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    paths = [f"{tmp_path}/{name}.png" for name in ("good", "broken", "missing")]
    (tmp_path / "list.csv").write_text("\n".join(["img_path", *paths, ""]))
    output = tmp_path / "codes"
    command = ["tokenizer.image_tokenization", "--input", tmp_path / "list.csv"]
    command += ["--output", output, "--ckpt", "tiny"]
    assert "2 images of 3 rows could not be read" in error_line(program(*command, status=3))
    lines = (output / "errors_rank_0.jsonl").read_text().splitlines()
    errors = [json.loads(line) for line in lines]
    assert [Path(e["img_path"]).name for e in errors] == ["broken.png", "missing.png"]
    assert all(Path(e["img_path"]).name in e["error"] for e in errors)
    table = pq.read_table(output / "partition_0_rank_0.parquet")
    assert table["img_path"].to_pylist() == paths[:1]
    program(*command, "--on_error", "skip")  # resumes: the images are not encoded again
    error = error_line(program(*command, "--partition_size", 7, status=2))
    assert "partition_size" in error


@pytest.mark.parametrize(
    "missing",
    [
        "models/tiny/consolidated.pth", "models/tiny/params.json", "tokenizer/vqgan.ckpt",
        "tokenizer/vqgan.yaml", "tokenizer/text_tokenizer.json",
    ],
)  # fmt: skip
def test_the_missing_file_of_a_checkpoint_is_named(
    program: Run, tmp_path: Path, missing: str
) -> None:
    shutil.copytree(tiny_folder(), tmp_path / "ckpt")
    (tmp_path / "ckpt" / missing).unlink()
    flags = ["--input_dir", tmp_path / "ckpt", "--output_dir", tmp_path / "hf"]
    error = error_line(program("conversion.pth_to_bin", *flags, status=2))
    assert Path(missing).name in error
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_unknown_flags_and_recipe_keys_are_refused(program: Run, tmp_path: Path) -> None:
    assert "no_such_flag" in error_line(program("training.train", "--no_such_flag", "1", status=2))
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1\n")
    flags = ["--config", tmp_path / "recipe.yaml", "--train_data", "x", "--ckpt", "tiny"]
    flags += ["--output_dir", tmp_path / "out"]
    assert "learning_rate" in error_line(program("training.train", *flags, status=2))


def test_an_existing_output_folder_is_not_overwritten(program: Run, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("keep me")
    flags = ["--input_dir", "tiny", "--output_dir", tmp_path / "hf"]
    error = error_line(program("conversion.pth_to_bin", *flags, status=2))
    assert "already exists" in error
    assert (tmp_path / "hf" / "mine.txt").read_text() == "keep me"


def test_a_max_length_too_small_for_an_image_is_refused(
    folder: Path, program: Run, tmp_path: Path
) -> None:
    flags = ["--train_data", folder / "train.jsonl", "--ckpt", "tiny", "--max_length", 40]
    flags += ["--output_dir", tmp_path / "out"]
    error = error_line(program("training.train", *flags, status=2))
    assert "too small for one image (expected at least 68)" in error


def test_an_untrained_adapter_is_not_merged(program: Run, tmp_path: Path) -> None:
    decoder = open_checkpoint("tiny").decoder(torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(decoder, config).save_pretrained(tmp_path / "adapter")
    flags = ["--ckpt_path", tmp_path / "adapter", "--base_path", "tiny"]
    flags += ["--output_dir", tmp_path / "merged"]
    assert "never trained" in error_line(program("conversion.merge_lora", *flags, status=2))
    assert not (tmp_path / "merged").exists()
