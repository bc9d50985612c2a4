"""Versions against the tested ranges, and a self-test of the embedded model.

The self-test compares image codes and logits with recorded ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypedDict

import torch
from packaging.version import Version

from medley.checkpoints.checkpoint import open_checkpoint
from medley.phantoms import Phantom
from medley.tiny.embedded import TINY, tiny_folder
from medley.utils.files import read_json

# Package -> first version, and first version after the range. They equal those of pyproject.toml.
TESTED = {
    "torch": ("2.7", "2.14"),
    "transformers": ("5.5", "5.25"),
    "peft": ("0.19", "0.22"),
    "accelerate": ("1.10", "1.16"),
    "deepspeed": ("0.18", "0.20"),
}
OPTIONAL = ("deepspeed",)
SELF_TEST = "self_test.json"  # file in the folder of the embedded model
LOGIT_TOLERANCE = 2e-3


class SelfTestValues(TypedDict):
    """Image codes of a known phantom, and some of the logits that follow them."""

    codes: list[int]
    logits: list[float]


@dataclass(frozen=True)
class SelfTestResult:
    """Number of image codes that differ, and the largest difference of a logit."""

    wrong_codes: int
    logit_difference: float

    @property
    def passed(self) -> bool:
        return not self.wrong_codes and self.logit_difference <= LOGIT_TOLERANCE


def versions() -> list[tuple[str, str, str]]:
    """Name, installed version and a note for each package with a tested range."""
    rows = []
    for name, (first, last) in TESTED.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            note = "not installed (needed for training)" if name in OPTIONAL else "NOT INSTALLED"
            rows.append((name, "-", note))
            continue
        is_tested = Version(first) <= Version(found) < Version(last)
        outside = f"outside of the tested range {first} <= version < {last}"
        rows.append((name, found, "tested" if is_tested else outside))
    return rows


def self_test_values(folder: Path | str = TINY) -> SelfTestValues:
    """Computes the values of the self-test. `tiny`'s recipe records them."""
    checkpoint = open_checkpoint(folder)
    image_tokenizer = checkpoint.image_tokenizer()
    image = Phantom("CT", "head").image(image_tokenizer.size)
    codes = image_tokenizer.encode([image])[0].tolist()
    vocabulary = checkpoint.text_tokenizer().vocabulary
    ids = [vocabulary.bos, *vocabulary.image_token_ids(codes), vocabulary.end_turn]
    with torch.inference_mode():
        logits = checkpoint.decoder(torch.float32)(torch.tensor([ids])).logits[0, -1]
    return {"codes": codes, "logits": [round(v, 5) for v in logits[::97].tolist()]}


def run_self_test() -> SelfTestResult:
    """Computes the values of the self-test on this machine and compares them with the recorded."""
    expected: SelfTestValues = read_json(tiny_folder() / SELF_TEST)
    found = self_test_values()
    code_pairs = zip(expected["codes"], found["codes"], strict=True)
    logit_pairs = zip(expected["logits"], found["logits"], strict=True)
    return SelfTestResult(
        sum(a != b for a, b in code_pairs), max(abs(a - b) for a, b in logit_pairs)
    )
