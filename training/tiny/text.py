"""The embedded text tokenizer: a byte-level BPE in Chameleon's id layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from medley.data.document import ImagePart
from medley.data.vocabulary import BEGIN_IMAGE, BOS, END_IMAGE, EOS, PAD, UNK, code_name
from medley.phantoms import VQGAN_MODALITIES, Phantom, change_document, documents
from training.tiny.recipe import CODES, Options

FIRST_TEXT_PIECE = 8712  # words begin behind the last reserved token

GENERAL_TEXT = """
What is shown in this picture? What abnormality is seen? Is the image normal? Where is the
lesion located? Is there evidence of a fracture, an effusion, an infarct, a hemorrhage or a
tumor? Which lobe, which side, which artery, which plane: axial, coronal or sagittal? Is
contrast used? Please describe this picture. What type of imaging modality was used to acquire
it? The lungs are clear, the heart is enlarged, the aorta is not. The right kidney, the liver,
the spleen, the pancreas, the bowel, the brain and its ventricles are normal. Bilateral pleural
effusions with cardiomegaly and pulmonary edema. Answer the question with yes or no. There is
a mass in the left upper lobe. Is this a T1 weighted or T2 weighted image, or a FLAIR sequence?
""".splitlines()


def phantom_texts(seed: int, scans: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    place = ImagePart(codes=(0,))
    for _ in range(scans):
        scan = Phantom.random(rng, VQGAN_MODALITIES)
        change = change_document(place, place, scan.later(rng)[1])
        for document in (*documents(scan, place, rng), change):
            yield from (p for turn in document.turns for p in turn.parts if isinstance(p, str))


def make_tokenizer(options: Options) -> dict[str, Any]:
    """A byte-level BPE in Chameleon's id layout, as the content of `text_tokenizer.json`."""
    before = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = before
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + options.merges, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([*GENERAL_TEXT, *phantom_texts(options.seed, 2000)], trainer)
    model = json.loads(trained.to_str())["model"]
    names = [BOS, PAD, EOS, UNK, *map(code_name, range(CODES)), END_IMAGE, BEGIN_IMAGE]
    names += [f"<reserved{i - 4:05d}>" for i in range(len(names), FIRST_TEXT_PIECE)]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    table = {name: index for index, name in enumerate([*names, *pieces])}
    whole = Tokenizer(models.BPE(table, [tuple(m) for m in model["merges"]], unk_token=UNK))
    whole.pre_tokenizer = before
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens(names)
    parsed: dict[str, Any] = json.loads(whole.to_str())
    return parsed
