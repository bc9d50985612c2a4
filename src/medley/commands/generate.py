"""`medley generate`: one prompt, or a file of prompts -> text and PNG files, `responses.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from medley.commands.model_options import RUNTIME_OPTIONS, BatchOptions
from medley.data.document import ImagePart
from medley.errors import PartialFailure, UserError
from medley.inference.batch import (
    generate_all,
    read_existing,
    save_response,
    write_html_report,
)
from medley.inference.interface import Prompt
from medley.inference.prompts import (
    check_context_room,
    fetch_image_part,
    fetch_images,
    folder_images,
    read_prompts,
)
from medley.utils.cli_options import Alias
from medley.utils.files import read_json, write_json
from medley.utils.jsonl import append_jsonl, jsonl_line, write_jsonl
from medley.utils.run_identity import check_same_run, run_identity

RESPONSES, OPTIONS = "responses.jsonl", "options.json"
_PRINTED_ROWS = 10
_NOT_IN_IDENTITY = ("output", "html_report", *RUNTIME_OPTIONS)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(BatchOptions):
    """Generates text and images in any order.

    Args:
        output: folder of responses.jsonl and of the images
        prompt: the question or request
        image: image files (or URLs, with --allow_network) before the prompt
        image_folder: folder with images before the prompt, such as the slices of a CT
        image_limit: use at most this many images of the folder, evenly spaced
        allow_network: download images that are given by a URL
        input: JSON Lines file of prompts (text and image_path) instead of --prompt; the same
            command resumes an interrupted run
        raw_prompt: continue the prompt itself, without an end-of-turn token
        html_report: write an HTML report, index.html, beside the responses
    """

    aliases: ClassVar = {"complete": Alias("raw_prompt"), "html": Alias("html_report")}

    output: Path
    prompt: str | None = None
    image: list[str] | None = None
    image_folder: Path | None = None
    image_limit: int | None = None
    allow_network: bool = False
    input: Path | None = None
    raw_prompt: bool = False
    html_report: bool = False

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.input is None):
            raise UserError("Use either --prompt or --input.")
        if self.input is not None and (self.image or self.image_folder):
            raise UserError(
                "--image and --image_folder require --prompt. The lines of --input name their own "
                "images."
            )
        if self.image_limit is not None and (self.image_folder is None or self.image_limit < 1):
            raise UserError("--image_limit must be at least 1 and requires --image_folder.")
        self.check_batch_size()
        self.generation()

    def identity(self) -> dict[str, Any]:
        return run_identity(self, _NOT_IN_IDENTITY, input=self.input)


def generate(options: GenerateOptions) -> None:
    prompts = [_make_prompt(options)] if options.input is None else read_prompts(options.input)
    rows = _read_earlier_rows(options)
    model = options.load(min(options.max_num_seqs, len(prompts)))
    if options.image_folder is not None:
        check_context_room(model, options.image_folder, prompts[0])
    generation = options.generation(model)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / RESPONSES
    if not rows:
        file.unlink(missing_ok=True)
        write_json(options.output / OPTIONS, options.identity())
    pending = [number for number in range(len(prompts)) if number not in rows]
    responses = generate_all(
        model, ((number, prompts[number], generation) for number in pending), options.raw_prompt,
        options.max_num_seqs, partial(fetch_images, allow_network=options.allow_network),
    )  # fmt: skip
    for number, response in tqdm(responses, desc="generating", unit="answer", total=len(pending)):
        rows[number] = save_response(options.output, number, response)
        append_jsonl(file, rows[number])
    _finish(options, [rows[number] for number in range(len(prompts))])


def _make_prompt(options: GenerateOptions) -> Prompt:
    """The images of --image and --image_folder, then the prompt."""
    assert options.prompt is not None
    images = [
        fetch_image_part(ImagePart(path=name), options.allow_network)
        for name in options.image or []
    ]
    if options.image_folder is not None:
        images += folder_images(options.image_folder, options.image_limit)
    return [*images, options.prompt]


def _read_earlier_rows(options: GenerateOptions) -> dict[int, dict[str, Any]]:
    """The rows of an interrupted run with the same options, without failed ones, by number."""
    file = options.output / RESPONSES
    if not file.exists():
        return {}
    saved = options.output / OPTIONS
    recorded = read_json(saved) if saved.exists() else {}
    if options.input is None:
        if recorded.get("input") is not None:
            raise UserError(
                f"{options.output}: The folder contains the responses to a file of prompts. Use "
                "another --output."
            )
        return {}  # a single prompt is generated again
    recorded = {_PRESENT_NAMES.get(name, name): value for name, value in recorded.items()}
    check_same_run(recorded, options.identity(), options.output)
    rows = {int(row["index"]): row for row in read_existing(file, "index") if "error" not in row}
    if rows:
        print(f"{options.output}: {len(rows)} prompts are answered already")
    return rows


_PRESENT_NAMES = {"complete": "raw_prompt"}  # alias


def _finish(options: GenerateOptions, rows: Sequence[dict[str, Any]]) -> None:
    write_jsonl(options.output / RESPONSES, rows)
    if options.html_report:
        write_html_report(options.output / "index.html", rows)
    for row in rows[:_PRINTED_ROWS]:
        print(jsonl_line(row), end="")
    print(f"{len(rows)} responses in {options.output}")
    failed = [row["error"] for row in rows if "error" in row]
    if failed:
        raise PartialFailure(
            f"{len(failed)} of {len(rows)} prompts failed (see {RESPONSES}). First error: "
            f"{failed[0]}"
        )
