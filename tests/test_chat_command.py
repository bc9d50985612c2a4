"""`medley chat`: typed prompts and a conversation in the terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from command_inputs import write_scans
from conftest import ROOT

from medley.data.document import ImagePart
from medley.inference.prompts import parse_typed_prompt


def test_typed_line_names_images() -> None:
    assert parse_typed_prompt('what is @a.png and @"b c.png" ?') == [
        "what is", ImagePart(path="a.png"), "and", ImagePart(path="b c.png"), "?",
    ]  # fmt: skip
    assert parse_typed_prompt("me@home.org") == ["me@home.org"]


def test_conversation_in_the_terminal(tmp_path: Path) -> None:
    write_scans(tmp_path)
    typed = f"@{tmp_path}/0.png What modality is this?\n@no.png hm\n/reset\nShow me.\n/quit\n"
    words = ["chat", "--ckpt", "tiny", "--output", tmp_path / "images", "--min_images", 1]
    done = subprocess.run(
        [sys.executable, "-m", "medley.cli", *map(str, words), "--max_images", "1"],
        input=typed, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(no.png: " in done.stdout
    assert "(new conversation)" in done.stdout
    images = sorted((tmp_path / "images").glob("*.png"))
    assert len(images) == 2
    assert f"[image saved as {images[1]}]" in done.stdout
