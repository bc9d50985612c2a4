"""`medley tokenize-images`: crashes, resuming on other numbers of ranks, failures, image lists."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

from medley.data.image_token_store import finished_partitions
from medley.utils.manifest import read_manifest
from medley.utils.temporary_files import temporary_path

PROGRAM = "tokenizer.image_tokenization"
ROWS, SIZE = 240, 8


@pytest.fixture(scope="module")
def image_list(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 240 small images; three are broken and one is missing."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{i}.png" for i in range(ROWS)]
    for i, path in enumerate(paths):
        Image.new("RGB", (40, 40), (i, 255 - i, 128)).save(path)
    for i in (0, 100, 239):
        paths[i].write_bytes(b"broken")
    paths[50].unlink()
    (folder / "list.csv").write_text("img_path\n" + "".join(f"{p}\n" for p in paths))
    return folder / "list.csv"


def torchrun(ranks: int, *flags: object) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks,
        "-m", PROGRAM, "--ckpt", "tiny", "--bs", 4, "--partition_size", SIZE, *flags,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def read_codes(folder: Path) -> dict[str, list[int]]:
    """Image path -> image codes. Duplicate paths fail the test."""
    codes: dict[str, list[int]] = {}
    for path in finished_partitions(folder).values():
        for row in pq.read_table(path).to_pylist():
            assert row["img_path"] not in codes
            codes[row["img_path"]] = row["img_tokens"]
    return codes


def failures(folder: Path) -> set[str]:
    lines = [x for p in folder.glob("errors_rank_*.jsonl") for x in p.read_text().splitlines()]
    return {Path(json.loads(line)["img_path"]).name for line in lines}


@pytest.mark.hostile(repeat=3)
def test_killed_run_resumes_with_another_number_of_ranks(
    image_list: Path, tmp_path: Path, program: Callable[..., Any]
) -> None:
    flags: list[object] = ["--input", image_list, "--ckpt", "tiny", "--partition_size", SIZE]
    complete, resumed = tmp_path / "complete", tmp_path / "resumed"
    done = program(PROGRAM, *flags, "--output", complete, "--bs", 64, status=3)
    assert "4 images of 240 rows could not be read" in done.stderr

    def kill_rank_after(partitions: int, ranks: int) -> None:
        job = torchrun(ranks, "--input", image_list, "--output", resumed)
        while len(list(resumed.glob("partition_*"))) < partitions:
            assert job.poll() is None, "the run ended before a rank was killed"
            time.sleep(0.005)
        workers = psutil.Process(job.pid).children()
        workers[-1].send_signal(signal.SIGKILL)
        assert job.wait(60) != 0
        assert len(list(resumed.glob("partition_*"))) < ROWS / SIZE

    kill_rank_after(2, ranks=2)
    kill_rank_after(8, ranks=3)
    job = torchrun(2, "--input", image_list, "--output", resumed)
    assert job.wait(120) == 1  # torchrun's status if a rank exits with 3
    assert read_codes(resumed) == read_codes(complete)
    assert len(read_codes(resumed)) == ROWS - 4
    assert failures(resumed) == failures(complete) == {"0.png", "50.png", "100.png", "239.png"}
    assert not list(resumed.glob(".*.part"))
    program(PROGRAM, *flags, "--output", resumed, "--on_error", "skip")  # all partitions exist


def test_output_of_another_run_is_rejected(
    image_list: Path, tmp_path: Path, program: Callable[..., Any]
) -> None:
    flags: list[object] = ["--input", image_list, "--ckpt", "tiny", "--on_error", "skip"]
    program(PROGRAM, *flags, "--output", tmp_path, "--n_limit", 9)
    manifest = read_manifest(tmp_path)
    assert manifest["token_space"] == manifest["run"]["token_space"]
    assert manifest["fit"] == "crop"
    done = program(PROGRAM, *flags, "--output", tmp_path, "--limit", 8, status=2)
    assert "rows was 9, now 8" in done.stderr
    done = program(PROGRAM, *flags, "--output", tmp_path, "--limit", 9, "--fit", "pad", status=2)
    assert "fit was 'crop', now 'pad'" in done.stderr


def test_all_frames_keep_the_columns_of_their_row(
    tmp_path: Path, program: Callable[..., Any]
) -> None:
    black, white = Image.new("L", (9, 9), 0), Image.new("L", (9, 9), 255)
    stack = tmp_path / "stack.tif"
    black.save(stack, save_all=True, append_images=[white, black])
    white.save(tmp_path / "one.png")
    (tmp_path / "l.csv").write_text(f"img_path,label\n{stack},007\n{tmp_path}/one.png,NA\n")
    flags = ["--input", tmp_path / "l.csv", "--ckpt", "tiny", "--keep_columns"]
    program(PROGRAM, *flags, "--output", tmp_path / "out", "--frames", "all", "--dtype", "bfloat16")
    table = pq.read_table(tmp_path / "out" / "partition_0_rank_0.parquet")
    assert table["img_path"].to_pylist() == [f"{stack}#{i}" for i in range(3)] + [
        f"{tmp_path}/one.png"
    ]
    assert table["label"].to_pylist() == ["007"] * 3 + ["NA"]
    codes = table["img_tokens"].to_pylist()
    assert codes[0] == codes[2] != codes[1] == codes[3]


def test_temporary_files_of_other_runs_are_kept(
    tmp_path: Path, program: Callable[..., Any]
) -> None:
    """A live rank of another run writes into the folder, and a folder's other files stay."""
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    Image.new("RGB", (40, 40)).save(images / "a.png")
    output.mkdir()
    (output / ".download.part").write_text("mine")
    with temporary_path(output / "partition_7_rank_3.parquet") as live:
        live.write_text("half")
        program(PROGRAM, "--input", images, "--ckpt", "tiny", "--output", output)
        assert live.read_text() == "half"
    assert (output / ".download.part").read_text() == "mine"
    assert len(finished_partitions(output)) == 1
