"""The reconstruction report, on synthetic scans."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import medley
from medley.phantoms import Phantom

PROGRAM = "tokenizer.reconstruction_report"


def test_report_has_all_groups_and_names_unreadable_images(
    tmp_path: Path, program: Callable[..., Any]
) -> None:
    lines = ["img_path,modality"]
    rng = np.random.default_rng(5)
    for i in range(6):
        Phantom.random(rng).image(64).save(tmp_path / f"{i}.png")
        lines.append(f"{tmp_path}/{i}.png,{'<CT>' if i % 2 else 'MR'}")
    (tmp_path / "3.png").write_bytes(b"damaged")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    output = tmp_path / "report"
    flags = ["--input", tmp_path / "list.csv", "--ckpt", "tiny", "--output", output]
    done = program(PROGRAM, *flags, "--group_by", "modality", "--bs", "2", status=3)
    assert "1 images could not be read" in done.stderr
    report = json.loads((output / "report.json").read_text())
    assert {n: g["images"] for n, g in report["groups"].items()} == {"MR": 3, "<CT>": 2}
    assert report["all"]["images"] == 5
    assert report["all"]["psnr"] > 20
    assert 0.5 < report["all"]["ssim"] <= 1
    codebook = medley.ImageTokenizer.from_checkpoint("tiny").vqgan.config.n_embed
    assert report["all"]["codes_used"] + report["all"]["codes_dead"] == codebook
    assert report["failed"][0]["img_path"].endswith("3.png")
    html = (output / "index.html").read_text()
    assert "&lt;CT&gt;" in html
    assert html.count("data:image/png;base64,") == 2
    done = program(PROGRAM, *flags, "--group_by", "organ", status=2)
    assert "--group_by (got 'organ', expected one of modality)" in done.stderr
