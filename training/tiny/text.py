"""The embedded text tokenizer: a byte-level BPE in Chameleon's id layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from medley.data.document import ImagePart
from medley.data.vocabulary import BEGIN_IMAGE, BOS, END_IMAGE, EOS, PAD, UNK, image_token_name
from medley.phantoms import VQGAN_MODALITIES, Phantom, change_document, documents
from training.tiny.recipe import CODES, Options

FIRST_TEXT_TOKEN = 8712  # follows the last reserved token

# Questions and phrases of medical VQA datasets, so that their words are short in tokens.
GENERAL_TEXT = Path(__file__).with_name("general_text.txt")


def phantom_texts(seed: int, scans: int) -> Iterator[str]:
    """All texts of the documents about random phantoms."""
    rng = np.random.default_rng(seed)
    image = ImagePart(codes=(0,))  # a placeholder
    for _ in range(scans):
        scan = Phantom.random(rng, VQGAN_MODALITIES)
        change = change_document(image, image, scan.progression(rng)[1])
        for document in (*documents(scan, image, rng), change):
            yield from (p for turn in document.turns for p in turn.parts if isinstance(p, str))


def make_tokenizer(options: Options) -> dict[str, Any]:
    """A byte-level BPE in Chameleon's id layout, as the content of `text_tokenizer.json`."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = splitter
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + options.merges, initial_alphabet=alphabet, show_progress=False
    )
    general = GENERAL_TEXT.read_text(encoding="utf-8").splitlines()
    trained.train_from_iterator([*general, *phantom_texts(options.seed, 2000)], trainer)
    model = json.loads(trained.to_str())["model"]
    names = [BOS, PAD, EOS, UNK, *map(image_token_name, range(CODES)), END_IMAGE, BEGIN_IMAGE]
    names += [f"<reserved{i - 4:05d}>" for i in range(len(names), FIRST_TEXT_TOKEN)]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    table = {name: index for index, name in enumerate([*names, *pieces])}
    tokenizer = Tokenizer(models.BPE(table, [tuple(m) for m in model["merges"]], unk_token=UNK))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names)
    parsed: dict[str, Any] = json.loads(tokenizer.to_str())
    return parsed
