"""Prompts of a file, answered and written down: JSONL, PNG files beside it, a page to look at."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medley.assistant import Answer, Model, Prompt
from medley.document import Document, DocumentError
from medley.errors import UserError
from medley.files import json_lines
from medley.generation import GenerationOptions


def prompts_in(path: Path) -> list[Prompt | Document]:
    """The prompts of a JSONL file.

    A line is like a document's: `text` with one `<image>` for each of `image_path`, or
    `messages` that end with the user's. Raises UserError with file and line for a bad one.
    """
    prompts: list[Prompt | Document] = []
    for number, line in json_lines(path):
        place = f"{path}:{number}"
        try:
            document = Document.from_json(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON ({error.msg})") from error
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


def answer_good(
    model: Model,
    prompts: Sequence[Prompt | Document],
    options: GenerationOptions,
    complete: bool,
    numbers: Sequence[int],
    batch_size: int = 32,
) -> list[Answer | str]:
    """Answers; for a prompt that cannot be answered (a broken picture, one that is longer than
    the context) the reason in its place. `numbers` seed the rows.
    """
    out: list[Answer | str] = []
    good: list[tuple[int, Prompt | Document]] = []
    for number, prompt in zip(numbers, prompts, strict=True):
        try:
            model.engine.check(model.prompt_ids(prompt, complete))
            good.append((number, prompt))
            out.append("")
        except UserError as error:
            out.append(str(error))
    rows, chosen = [number for number, _ in good], [options] * len(good)
    found = model.answer_batch([p for _, p in good], chosen, complete, batch_size, rows)
    answers = iter(found)
    return [next(answers) if reason == "" else reason for reason in out]


def save_answer(folder: Path, number: int, answer: Answer | str) -> dict[str, Any]:
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


def page(rows: list[dict[str, Any]]) -> str:
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
