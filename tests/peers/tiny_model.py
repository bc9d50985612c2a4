"""A random decoder with two layers in Hugging Face's layout, for suites that load one by name."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import write_hugging_face
from medley.modeling.chameleon import ChameleonForConditionalGeneration


def write(folder: Path) -> None:
    """Float32 weights, so that the suites' tolerances apply. Tokenizer and processor as written."""
    torch.manual_seed(0)
    source = open_checkpoint("tiny")
    config = source.config()
    config.num_hidden_layers = 2
    write_hugging_face(folder, source)
    ChameleonForConditionalGeneration(config).float().save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
