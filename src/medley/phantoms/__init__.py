"""Synthetic scans with known contents: the training data of the embedded model.

`scenes` renders them, `measurement` extracts the contents from pixels (so generated images are
scored without a person or a judge model), `captions` writes questions and texts about them.

    scan = Phantom.random(numpy.random.default_rng(0))
    pixels = scan.render(size=64)        # uint8 (64, 64, 3)
    measure(pixels).findings             # the same findings
"""

from medley.phantoms.captions import (
    CHANGE_QUESTION,
    caption,
    change_document,
    change_text,
    documents,
    facts,
    facts_in,
    follow_up_questions,
    illustrated_report,
    prompt_for,
    questions,
    report,
)
from medley.phantoms.measurement import Measurement, measure
from medley.phantoms.scenes import (
    ALL_MODALITIES,
    BRIGHTNESSES,
    KINDS,
    LEVELS,
    MODALITIES,
    NEW_MODALITY,
    SIDES,
    SIZES,
    VQGAN_MODALITIES,
    Change,
    Finding,
    Phantom,
    appearances_of,
    article,
    organs_of,
)

__all__ = [
    "ALL_MODALITIES",
    "BRIGHTNESSES",
    "CHANGE_QUESTION",
    "KINDS",
    "LEVELS",
    "MODALITIES",
    "NEW_MODALITY",
    "SIDES",
    "SIZES",
    "VQGAN_MODALITIES",
    "Change",
    "Finding",
    "Measurement",
    "Phantom",
    "appearances_of",
    "article",
    "caption",
    "change_document",
    "change_text",
    "documents",
    "facts",
    "facts_in",
    "follow_up_questions",
    "illustrated_report",
    "measure",
    "organs_of",
    "prompt_for",
    "questions",
    "report",
]
