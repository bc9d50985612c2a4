"""Documents rendered for inspection before training: as text, and as an HTML report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from PIL import Image

from medley.data.document import ContentPart, Document, ImagePart, assistant_spans, ids_to_parts
from medley.data.vocabulary import BOS, END_TURN, EOS, TextTokenizer
from medley.errors import UserError
from medley.images.preprocess import open_image
from medley.utils.html import data_url, render

TRAINED_ON = "\u27e6", "\u27e7"  # white square brackets around the tokens that are trained on
THUMBNAIL = 256  # pixels of the longer side


def preview_text(
    ids: Sequence[int],
    tokenizer: TextTokenizer,
    spans: Sequence[tuple[int, int]] | None = None,
) -> str:
    """Ids -> text with the trained tokens in white square brackets.

    An image is shown as its number of codes. `spans` are the ranges (start, end) of the trained
    tokens; by default, these are the assistant turns of a document.
    """
    spans = assistant_spans(ids, tokenizer.vocabulary) if spans is None else spans
    special = {tokenizer.vocabulary.bos: BOS, tokenizer.vocabulary.eos: EOS}
    special[tokenizer.vocabulary.end_turn] = END_TURN
    edges = sorted({0, len(ids), *(edge for span in spans for edge in span)})
    trained_starts = {start for start, _ in spans}
    segments = []
    for start, end in pairwise(edges):
        text = "".join(_text_pieces(list(ids[start:end]), special, tokenizer))
        segments.append(text.join(TRAINED_ON) if start in trained_starts else text)
    return "".join(segments)


def _text_pieces(
    ids: list[int], special: dict[int, str], tokenizer: TextTokenizer
) -> Iterator[str]:
    ordinary: list[int] = []
    for token in [*ids, None]:
        if token is not None and token not in special:
            ordinary.append(token)
            continue
        for part in ids_to_parts(ordinary, tokenizer):
            yield part if isinstance(part, str) else f"[image of {len(part.codes or ())} codes]"
        ordinary = []
        if token is not None:
            yield special[token]


def render_documents(
    title: str,
    summary: Sequence[tuple[str, str]],
    documents: Sequence[tuple[str, Document]],
    load_image: Callable[[ImagePart], Image.Image | str],
) -> str:
    """An HTML report of documents with embedded images.

    `load_image` returns an image, or the reason why it is not available.
    """
    sections = [
        {
            "name": name,
            "turns": [
                {
                    "role": turn.role,
                    "parts": [_render_part(part, load_image) for part in turn.parts],
                }
                for turn in document.turns
            ],
        }
        for name, document in documents
    ]
    return render("documents.html", title, summary=summary, documents=sections)


def image_loader(
    decode: Callable[[Sequence[Sequence[int]]], list[Image.Image]] | None,
) -> Callable[[ImagePart], Image.Image | str]:
    """A `load_image` for `render_documents`.

    It decodes an image with codes by `decode`, if given, and otherwise opens the image's file.
    """

    def load(part: ImagePart) -> Image.Image | str:
        try:
            if decode is not None and part.codes is not None:
                return decode([part.codes])[0]
            if part.path is not None:
                return open_image(part.path, "middle")
        except UserError as error:
            return str(error)
        return f"An image of {len(part.codes or ())} codes. Pass --ckpt to decode it."

    return load


def _render_part(
    part: ContentPart, load_image: Callable[[ImagePart], Image.Image | str]
) -> dict[str, str]:
    if isinstance(part, str):
        return {"text": part}
    image = load_image(part)
    return {"error": image} if isinstance(image, str) else {"image": data_url(image, THUMBNAIL)}
