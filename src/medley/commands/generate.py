"""`medley generate`: one prompt or a file of them -> text and PNG files, `responses.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medley.commands.model_options import BatchOptions
from medley.data.document import ContentPart, Document, ImagePart
from medley.errors import PartialFailure, UserError
from medley.images.remote import fetch_image, is_address
from medley.images.sources import ImageList
from medley.inference.batch import (
    check_same_options,
    generate_all,
    read_existing,
    read_prompts,
    render_html,
    save_response,
)
from medley.inference.model import Model, Prompt
from medley.utils.cli_options import resolved
from medley.utils.files import atomic_file, partial_hash, read_json, write_json
from medley.utils.jsonl import append_jsonl

RESPONSES, OPTIONS = "responses.jsonl", "options.json"
_WITHOUT_EFFECT = (
    "output",
    "html",
    "batch_size",
    "deterministic",
    "device",
)  # on what the answers are


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(BatchOptions):
    """Generates text and pictures in any order.

    Args:
        output: folder of responses.jsonl and of the pictures
        prompt: the question or request
        image: picture files (or addresses, with --allow_network) that stand before the prompt
        image_folder: folder whose pictures stand before the prompt (the slices of a CT)
        image_limit: take so many of the folder's pictures, evenly spread
        allow_network: fetch pictures that are given by their address
        input: JSONL file of prompts in place of --prompt, lines with text and image_path; a run
            that was stopped goes on where it was
        complete: continue the prompt itself, without an end-of-turn mark
        html: write index.html beside the responses
    """

    output: Path
    prompt: str | None = None
    image: list[str] | None = None
    image_folder: Path | None = None
    image_limit: int | None = None
    allow_network: bool = False
    input: Path | None = None
    complete: bool = False
    html: bool = False

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.input is None):
            raise UserError("give either --prompt or --input")
        if self.input is not None and (self.image or self.image_folder):
            raise UserError("--image belongs to --prompt; in --input the lines name their pictures")
        if self.image_limit is not None and (self.image_folder is None or self.image_limit < 1):
            raise UserError("--image_limit is a number from 1 on, for --image_folder")
        self.check_batch()
        self.generation()


def generate(options: GenerateOptions) -> None:
    prompts = read_prompts(options.input) if options.input is not None else [_parts(options)]
    done = _earlier(options)
    model = options.load(min(options.rows_at_once, len(prompts)))
    if options.image_folder is not None:
        pictures = sum(isinstance(part, ImagePart) for part in _alone(prompts))
        check_context_room(model, options.image_folder, pictures)
    chosen = options.generation(model)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / RESPONSES
    if not done:
        file.unlink(missing_ok=True)
        write_json(options.output / OPTIONS, _identity(options))
    left = [number for number in range(len(prompts)) if number not in done]
    asked = ((number, prompts[number], chosen) for number in left)
    fetch = partial(with_pictures, allow_network=options.allow_network)
    found = generate_all(model, asked, options.complete, options.rows_at_once, fetch)
    for number, answer in tqdm(found, desc="generating", unit="answer", total=len(left)):
        done[number] = save_response(options.output, number, answer)
        append_jsonl(file, done[number])
    _finish(options, [done[number] for number in range(len(prompts))])


def _finish(options: GenerateOptions, rows: list[dict[str, Any]]) -> None:
    with atomic_file(options.output / RESPONSES) as temporary:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        temporary.write_text("".join(lines), encoding="utf-8")
    if options.html:
        with atomic_file(options.output / "index.html") as temporary:
            temporary.write_text(render_html(rows), encoding="utf-8")
    for row in rows[:10]:
        print(json.dumps(row, ensure_ascii=False))
    print(f"{len(rows)} answers in {options.output}")
    failed = [row["error"] for row in rows if "error" in row]
    if failed:
        raise PartialFailure(
            f"{len(failed)} of {len(rows)} prompts failed: {failed[0]} (see {RESPONSES})"
        )


def with_pictures(prompt: Prompt | Document, allow_network: bool) -> Prompt | Document:
    """The prompt with the pictures fetched that are given by their address.

    Raises UserError for an address where the network is not allowed.
    """
    if isinstance(prompt, Document):
        return prompt.map_images(lambda picture: _fetched(picture, allow_network))
    return [_fetched(p, allow_network) if isinstance(p, ImagePart) else p for p in prompt]


def _fetched(picture: ImagePart, allow_network: bool) -> ImagePart:
    name = str(picture.path)
    if picture.path is None or not is_address(name) or Path(name).exists():
        return picture
    if not allow_network:
        raise UserError(f"{name}: an address; --allow_network fetches it")
    return ImagePart(image=fetch_image(name))


def _parts(options: GenerateOptions) -> Prompt:
    assert options.prompt is not None
    parts: list[ContentPart] = [
        _fetched(ImagePart(path=name), options.allow_network) for name in options.image or []
    ]
    if options.image_folder is not None:
        slices = [
            source
            for part in ImageList(options.image_folder).parts(1000)
            for source in part.with_frames("all").sources
        ]
        count = min(options.image_limit or len(slices), len(slices))
        chosen = (slices[i * len(slices) // count] for i in range(count))
        parts += [ImagePart(image=source.open()) for source in chosen]
    return [*parts, options.prompt]


def _alone(prompts: Sequence[Prompt | Document]) -> Prompt:
    (prompt,) = prompts
    assert not isinstance(prompt, Document)
    return prompt


def check_context_room(model: Model, folder: Path, count: int) -> None:
    """Raises UserError where a folder's pictures are more than the context has room for."""
    each = model.image_tokenizer.codes_per_image + 2
    room = (model.engine.context - 100) // each  # some words are wanted as well
    print(f"{folder}: {count} pictures of {each} tokens; the context has room for {room}")
    if count > room:
        raise UserError(
            f"{folder}: {count} pictures, the context of {model.engine.context} tokens has room "
            f"for {room}: --image_limit {room} takes that many, evenly spread"
        )


def _identity(options: GenerateOptions) -> dict[str, Any]:
    """What the answers depend on."""
    kept = {n: v for n, v in resolved(options).items() if n not in _WITHOUT_EFFECT}
    return kept | ({"input_hash": partial_hash(options.input)} if options.input else {})


def _earlier(options: GenerateOptions) -> dict[int, dict[str, Any]]:
    """Answers of a run of the same options that was stopped; those that failed come again."""
    file = options.output / RESPONSES
    if not file.exists():
        return {}
    saved = options.output / OPTIONS
    if options.input is None:
        if saved.exists() and read_json(saved).get("input") is not None:
            raise UserError(f"{options.output}: holds answers to a file; name another --output")
        return {}  # one prompt is answered again
    before = read_json(saved) if saved.exists() else {}
    check_same_options(before, _identity(options), options.output)
    found = {int(row["index"]): row for row in read_existing(file, "index") if "error" not in row}
    if found:
        print(f"{options.output}: {len(found)} answers are there already")
    return found
