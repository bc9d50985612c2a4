"""Prompts of a file, answered and written down: JSONL, PNG files beside it, a page to look at."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from medley.data.document import Document, DocumentError
from medley.errors import UserError
from medley.generation import GenerationOptions, Request
from medley.inference.model import Model, Prompt, Response
from medley.utils.jsonl import json_lines


def read_prompts(path: Path) -> list[Prompt | Document]:
    """The prompts of a JSONL file.

    A line is like a document's: `text` with one `<image>` for each of `image_path`, or
    `messages` that end with the user's. Raises UserError with file and line for a bad one.
    """
    prompts: list[Prompt | Document] = []
    for number, line in json_lines(path):
        place = f"{path}:{number}"
        try:
            document = Document.from_json(json.loads(line))
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({error})") from error
        except DocumentError as error:
            raise UserError(f"{place}: {error}") from error
        if len(document.turns) % 2 == 0:
            raise UserError(
                f"{place}: ends with an answer already; a prompt ends with the user's turn (leave "
                "out <reserved08706> and what follows)"
            )
        alone = len(document.turns) == 1
        prompts.append(list(document.turns[0].parts) if alone else document)
    if not prompts:
        raise UserError(f"{path}: no prompts in it")
    return prompts


def generate_all(
    model: Model,
    prompts: Iterable[tuple[int, Prompt | Document, GenerationOptions]],
    complete: bool = False,
    batch_size: int = 32,
    prepare: Callable[[Prompt | Document], Prompt | Document] = lambda prompt: prompt,
) -> Iterator[tuple[int, Response | str]]:
    """(number, answer) of each (number, prompt, options) as it is there, in no order; for a prompt
    that cannot be answered (a broken picture, one that is longer than the context) the reason.

    The number seeds the row. Prompts are prepared, and their pictures read, as there is room.
    """
    failed: list[tuple[int, str]] = []
    numbers: list[int] = []

    def requests() -> Iterator[Request]:
        for number, prompt, options in prompts:
            try:
                ids = model.encode_prompt(prepare(prompt), complete)
                model.engine.check(ids)
            except UserError as error:
                failed.append((number, str(error)))
                continue
            numbers.append(number)
            yield Request(ids, options, number)

    steps = model.engine.run(requests(), batch_size)
    with closing(steps):
        for index, token, result in steps:
            yield from failed
            failed.clear()
            if token is None:
                yield numbers[index], model.to_response(result)
    yield from failed


# --- files that a run goes on with ------------------------------------------------------------


def read_existing(path: Path, key: str) -> list[dict[str, Any]]:
    """The whole rows of an answer file; what a kill left of a line is left out.

    Raises UserError for a row without `key`: that is another kind of file.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else (), 1):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            continue
        if not isinstance(row, dict) or key not in row:
            raise UserError(
                f"{path}:{number}: no {key!r}; is it another file? name another --output"
            )
        rows.append(row)
    return rows


def check_same_options(before: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """Raises UserError where the answers that are there come from other options."""
    changed = sorted(n for n in {*before, *now} if before.get(n) != now.get(n))
    if changed:
        raise UserError(
            f"{output}: holds answers of other options ({', '.join(changed)}); name another "
            "--output"
        )


def save_response(folder: Path, number: int, answer: Response | str) -> dict[str, Any]:
    """Pictures to PNG files; gives the line of responses.jsonl."""
    if isinstance(answer, str):
        return {"index": number, "error": answer}
    parts: list[dict[str, str]] = []
    for part in answer.parts:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        else:
            name = f"{number:05d}_{len(parts)}.png"
            part.save(folder / name)
            parts.append({"type": "image", "file": name})
    row = {"index": number, "parts": parts, "finish_reason": answer.finish_reason}
    return row | ({"note": answer.note} if answer.note else {})


def render_html(rows: list[dict[str, Any]]) -> str:
    """The answers as one HTML page beside their pictures."""
    blocks = []
    for row in rows:
        inner = "".join(
            f"<span>{html.escape(part['text'])}</span>"
            if part["type"] == "text"
            else f"<img src='{html.escape(part['file'])}' alt='generated picture'>"
            for part in row.get("parts", [])
        )
        blocks.append(f"<p><b>{row['index']}</b> {inner}{html.escape(row.get('error', ''))}</p>")
    style = "body{font-family:sans-serif;margin:2em}img{width:192px;image-rendering:pixelated}"
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Medley: responses</title>"
        f"<style>{style}</style><h1>Responses</h1>{''.join(blocks)}"
        "<p>Research only, not for clinical decisions.</p></html>"
    )
