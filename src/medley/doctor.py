"""`medley doctor`: versions against the tested range, devices, and a golden self-test."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch
from packaging.version import Version

from medley.checkpoints.checkpoint import open_checkpoint
from medley.errors import UserError
from medley.phantoms import Phantom
from medley.tiny.embedded import TINY, tiny_folder
from medley.utils.files import read_json

# From the first to, not including, the last; the newest of each is what the tests run with.
TESTED = {
    "torch": ("2.6", "2.14"),
    "transformers": ("5.20", "5.24"),
    "peft": ("0.19", "0.22"),
    "accelerate": ("1.10", "1.16"),
    "deepspeed": ("0.18", "0.20"),
}
OPTIONAL = ("deepspeed",)
SELF_TEST = "self_test.json"  # beside the embedded model
LOGIT_TOLERANCE = 2e-3


def versions() -> list[tuple[str, str, str]]:
    """Package, version, and what is to be said of it."""
    rows = []
    for name, (first, last) in TESTED.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            note = "not installed (needed for training)" if name in OPTIONAL else "NOT INSTALLED"
            rows.append((name, "-", note))
            continue
        good = Version(first) <= Version(found) < Version(last)
        note = "tested" if good else f"outside of the tested range {first} <= version < {last}"
        rows.append((name, found, note))
    return rows


def self_test_values(folder: Path | str = TINY) -> dict[str, object]:
    """Codes of a known phantom and logits behind it: what every machine must find again."""
    checkpoint = open_checkpoint(folder)
    tokenizer = checkpoint.image_tokenizer()
    codes = tokenizer.encode([Phantom("CT", "head").image(tokenizer.size)])[0].tolist()
    text = checkpoint.text_tokenizer()
    ids = [text.vocabulary.bos, *text.vocabulary.image_token_ids(codes), text.vocabulary.end_turn]
    with torch.inference_mode():
        logits = checkpoint.decoder(torch.float32)(torch.tensor([ids])).logits[0, -1]
    return {"codes": codes, "logits": [round(v, 5) for v in logits[::97].tolist()]}


def examine() -> None:
    """Prints what was found. Raises UserError when the self-test fails."""
    print(f"python {platform.python_version()} on {platform.machine()}")
    for name, found, note in versions():
        print(f"{name:14} {found:16} {note}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: {', '.join([*devices, 'cpu'])}, {torch.get_num_threads()} threads")
    expected, found_values = read_json(tiny_folder() / SELF_TEST), self_test_values()
    wrong = sum(
        a != b
        for a, b in zip(expected["codes"], found_values["codes"], strict=True)  # type: ignore[call-overload]
    )
    pairs = zip(expected["logits"], found_values["logits"], strict=True)  # type: ignore[call-overload]
    difference = max(abs(a - b) for a, b in pairs)
    print(f"self-test: {wrong} image codes differ, logits differ by at most {difference:.2g}")
    if wrong or difference > LOGIT_TOLERANCE:
        raise UserError(
            f"the self-test failed: {wrong} codes and logits by {difference:.2g} (limit "
            f"{LOGIT_TOLERANCE}); install the tested versions listed above"
        )
    print("all is well")
