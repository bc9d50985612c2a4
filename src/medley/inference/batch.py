"""Batch inference: many prompts -> responses as they are ready, in JSON Lines and image files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from medley.data.document import Document
from medley.errors import UserError
from medley.generation import GenerationOptions, Request
from medley.generation.engine import MAX_NUM_SEQS
from medley.inference.interface import Prompt
from medley.inference.model import Model
from medley.inference.response import Response
from medley.utils.files import atomic_file
from medley.utils.html import render


def generate_all(
    model: Model,
    prompts: Iterable[tuple[int, Prompt | Document, GenerationOptions]],
    raw_prompt: bool = False,
    batch_size: int = MAX_NUM_SEQS,
    prepare: Callable[[Prompt | Document], Prompt | Document] = lambda prompt: prompt,
) -> Iterator[tuple[int, Response | str]]:
    """Yields (number, response) for each (number, prompt, options) as it is ready, in any order.

    For a prompt that cannot be processed (an unreadable image, too many tokens for the context or
    the memory) the second value is the reason. The number seeds the sequence. Prompts are prepared,
    and their images opened, when there is room for them.
    """
    failed: list[tuple[int, str]] = []
    numbers: list[int] = []  # of the valid requests, in order

    def requests() -> Iterator[Request]:
        for number, prompt, options in prompts:
            try:
                ids = model.encode_prompt(prepare(prompt), raw_prompt)
                request = Request(ids, options, number)
                model.engine.check(request)
            except UserError as error:
                failed.append((number, str(error)))
                continue
            numbers.append(number)
            yield request

    steps = model.engine.run(requests(), batch_size)
    with closing(steps):
        for index, token, output in steps:
            yield from failed
            failed.clear()
            if token is None:
                yield numbers[index], output.error or model.to_response(output)
    yield from failed


# --- output files -----------------------------------------------------------------------------


def read_existing(path: Path, key: str) -> list[dict[str, Any]]:
    """The complete rows of a JSON Lines output; none if the file does not exist.

    An incomplete line of an interrupted run is skipped. Raises UserError for a row without `key`.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else (), 1):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            continue
        if not isinstance(row, dict) or key not in row:
            raise UserError(
                f"{path}:{number}: The row has no {key!r}, so this is another kind of file. Use "
                "another --output."
            )
        rows.append(row)
    return rows


def save_images(folder: Path, name: str, response: Response) -> list[Path]:
    """Writes the images of a response to `NAME_0.png`, `NAME_1.png` and so on."""
    paths = []
    for number, image in enumerate(response.images):
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{name}_{number}.png")
        image.save(paths[-1])
    return paths


def save_response(folder: Path, number: int, response: Response | str) -> dict[str, Any]:
    """Writes the images to PNG files and returns the row of responses.jsonl.

    `response` is an error message if the prompt could not be processed.
    """
    if isinstance(response, str):
        return {"index": number, "error": response}
    parts: list[dict[str, str]] = []
    for part in response.parts:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        else:
            name = f"{number:05d}_{len(parts)}.png"
            part.save(folder / name)
            parts.append({"type": "image", "file": name})
    row = {"index": number, "parts": parts, "finish_reason": response.finish_reason}
    return row | ({"note": response.note} if response.note else {})


def write_html_report(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes an HTML report of the rows of responses.jsonl, beside their images."""
    with atomic_file(path) as temporary:
        temporary.write_text(render("responses.html", "Responses", rows=rows), encoding="utf-8")
