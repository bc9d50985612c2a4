"""Documents as a person wants to see them before spending GPU days: what is learned, marked."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from PIL import Image

from medley.data.document import Document, ImagePart, assistant_spans, ids_to_parts
from medley.data.vocabulary import BOS, END_TURN, EOS, TextTokenizer

LEARNED = "\u27e6", "\u27e7"  # white square brackets around what is learned
THUMBNAIL = 256  # pixels of the longer side


def example_text(
    ids: Sequence[int],
    tokenizer: TextTokenizer,
    spans: Sequence[tuple[int, int]] | None = None,
) -> str:
    """Ids as text: pictures by their number of codes, what is learned between white square
    brackets. `spans` (start, end) say what that is; a whole document's answers unless given.
    """
    spans = assistant_spans(ids, tokenizer.vocabulary) if spans is None else spans
    marks = {tokenizer.vocabulary.bos: BOS, tokenizer.vocabulary.eos: EOS}
    marks[tokenizer.vocabulary.end_turn] = END_TURN
    edges = sorted({0, len(ids), *(edge for span in spans for edge in span)})
    learned = {start for start, _ in spans}
    pieces = []
    for start, end in pairwise(edges):
        shown = "".join(_pieces(list(ids[start:end]), marks, tokenizer))
        pieces.append(shown.join(LEARNED) if start in learned else shown)
    return "".join(pieces)


def _pieces(ids: list[int], marks: dict[int, str], tokenizer: TextTokenizer) -> Iterator[str]:
    plain: list[int] = []
    for token in [*ids, None]:
        if token is not None and token not in marks:
            plain.append(token)
            continue
        for part in ids_to_parts(plain, tokenizer):
            yield part if isinstance(part, str) else f"[picture of {len(part.codes or ())} codes]"
        plain = []
        if token is not None:
            yield marks[token]


def page(
    title: str,
    summary: Sequence[tuple[str, str]],
    documents: Sequence[tuple[str, Document]],
    show: Callable[[ImagePart], Image.Image | str],
) -> str:
    """An HTML page of documents with their pictures inside; `show` gives a picture, or why not."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in summary
    )
    shown = "".join(
        f"<section><h2>{html.escape(name)}</h2>{_document(document, show)}</section>"
        for name, document in documents
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>
<style>body{{font:16px system-ui;margin:2rem auto;max-width:60rem;padding:0 1rem}}
section{{border-top:1px solid #ccc}}h2{{font-size:1rem}}img{{max-width:100%;display:block}}
th{{text-align:left;padding-right:2rem}}p{{white-space:pre-wrap;margin:.3rem 0;padding:.5rem}}
.assistant{{border-left:.4rem solid #2a7}}.user{{border-left:.4rem solid #999}}
.missing{{color:#b00}}</style>
<h1>{html.escape(title)}</h1><table>{rows}</table>
<p>Green: what is learned (the assistant's turns). Grey: what is read only.</p>{shown}</html>
"""


def _document(document: Document, show: Callable[[ImagePart], Image.Image | str]) -> str:
    return "".join(
        f'<p class="{turn.role}">'
        + "".join(html.escape(p) if isinstance(p, str) else _picture(show(p)) for p in turn.parts)
        + "</p>"
        for turn in document.turns
    )


def _picture(image: Image.Image | str) -> str:
    if isinstance(image, str):
        return f'<span class="missing">[{html.escape(image)}]</span>'
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "jpeg", quality=85)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="a picture of the document" src="data:image/jpeg;base64,{encoded}">'
