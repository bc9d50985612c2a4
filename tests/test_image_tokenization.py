"""The program: kills, other numbers of ranks, failures, every kind of list."""

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

PROGRAM = "tokenizer.image_tokenization"
ROWS, SIZE = 240, 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 small pictures in a CSV, three of them broken, one missing."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{i}.png" for i in range(ROWS)]
    for i, path in enumerate(paths):
        Image.new("RGB", (40, 40), (i, 255 - i, 128)).save(path)
    for i in (0, 100, 239):
        paths[i].write_bytes(b"torn")
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


def rows(folder: Path) -> dict[str, list[int]]:
    """Every picture with its codes; a picture that stands twice fails the test."""
    found: dict[str, list[int]] = {}
    for path in finished_partitions(folder).values():
        for row in pq.read_table(path).to_pylist():
            assert row["img_path"] not in found
            found[row["img_path"]] = row["img_tokens"]
    return found


def failures(folder: Path) -> set[str]:
    lines = [x for p in folder.glob("errors_rank_*.jsonl") for x in p.read_text().splitlines()]
    return {Path(json.loads(line)["img_path"]).name for line in lines}


def test_a_killed_run_goes_on_with_another_number_of_ranks(
    pictures: Path, tmp_path: Path, program: Callable[..., Any]
) -> None:
    flags: list[object] = ["--input", pictures, "--ckpt", "tiny", "--partition_size", SIZE]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    done = program(PROGRAM, *flags, "--output", whole, "--bs", 64, status=3)
    assert "4 pictures of 240 rows could not be read" in done.stderr

    def kill_a_rank_after(partitions: int, ranks: int) -> None:
        job = torchrun(ranks, "--input", pictures, "--output", torn)
        while len(list(torn.glob("partition_*"))) < partitions:
            assert job.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        workers = psutil.Process(job.pid).children()
        workers[-1].send_signal(signal.SIGKILL)
        assert job.wait(60) != 0
        assert len(list(torn.glob("partition_*"))) < ROWS / SIZE

    kill_a_rank_after(2, ranks=2)
    kill_a_rank_after(8, ranks=3)
    job = torchrun(2, "--input", pictures, "--output", torn)
    assert job.wait(120) == 1  # torchrun's own status for a rank that ended with 3
    assert rows(torn) == rows(whole)
    assert len(rows(torn)) == ROWS - 4
    assert failures(torn) == failures(whole) == {"0.png", "50.png", "100.png", "239.png"}
    assert not list(torn.glob(".*.part"))
    program(PROGRAM, *flags, "--output", torn, "--allow_errors")  # nothing left to do


def test_a_folder_of_another_run_is_refused(
    pictures: Path, tmp_path: Path, program: Callable[..., Any]
) -> None:
    flags: list[object] = ["--input", pictures, "--ckpt", "tiny", "--allow_errors"]
    program(PROGRAM, *flags, "--output", tmp_path, "--n_limit", 9)
    manifest = read_manifest(tmp_path)
    assert manifest["token_space"] == manifest["run"]["token_space"]
    assert manifest["fit"] == "crop"
    done = program(PROGRAM, *flags, "--output", tmp_path, "--n_limit", 8, status=2)
    assert "holds a run with rows 9, this one has 8" in done.stderr
    done = program(PROGRAM, *flags, "--output", tmp_path, "--n_limit", 9, "--fit", "pad", status=2)
    assert "holds a run with fit 'crop', this one has 'pad'" in done.stderr


def test_a_second_run_cannot_write_the_same_partition(tmp_path: Path) -> None:
    import numpy as np

    from medley.data.image_token_store import partition_file, write_partition
    from medley.errors import UserError

    codes = np.zeros((1, 4), np.uint16)
    write_partition(partition_file(tmp_path, 1, 0), ["a"], codes, [])
    write_partition(partition_file(tmp_path, 11, 1), ["b"], codes, [])
    with pytest.raises(UserError, match="another run is writing"):
        write_partition(partition_file(tmp_path, 1, 1), ["a"], codes, [])


def test_every_frame_of_a_stack_with_its_columns(
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
