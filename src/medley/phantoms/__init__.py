"""Drawn scans whose true contents are known: the data of the embedded model.

`world` draws them, `reading` finds in pixels what was drawn (so that a generated picture is scored
without a human or a judge), `texts` asks and tells about them.

    scan = Phantom.random(numpy.random.default_rng(0))
    pixels = scan.draw(size=64)          # uint8 (64, 64, 3)
    measure(pixels).findings             # the same findings
"""

from medley.phantoms.reading import Measurement, measure
from medley.phantoms.texts import (
    CHANGED,
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
from medley.phantoms.world import (
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
    article,
    organs_of,
    signs_of,
)

__all__ = [
    "ALL_MODALITIES",
    "BRIGHTNESSES",
    "CHANGED",
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
    "signs_of",
]
