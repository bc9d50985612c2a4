"""The `medley` command: using a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medley.doctor import doctor
from medley.document import Document, Picture
from medley.errors import DataLost, UserError
from medley.files import whole_file
from medley.generation.options import GenerationOptions, Mode
from medley.loading import Prompt, load
from medley.options import run_program
from medley.responses import answer_good, page, prompts_in, save_answer


@dataclass(frozen=True)
class GenerateOptions:
    """Generates text and pictures in any order.

    Args:
        ckpt: checkpoint in any layout, an adapter, or tiny
        output: folder of responses.jsonl and of the pictures
        prompt: the question or request
        image: picture files that stand before the prompt
        input: JSONL file of prompts in place of --prompt, lines with text and image_path
        mode: any, text or image
        adapter: adapter that is laid over the checkpoint
        base: base of a checkpoint that is an adapter
        vqgan: folder of a VQGAN with a decoder, for checkpoints that carry none
        device: auto, cpu, cuda or mps
        dtype: auto, float32, bfloat16 or float16
        complete: continue the prompt itself, without an end-of-turn mark
        html: write index.html beside the responses
        batch_size: rows that are generated at once
        max_new_tokens: longest answer
        seed: seed of the sampling
        text_greedy: take the likeliest word
        text_temperature: temperature of words
        text_top_p: share of probability that words are sampled from
        repetition_penalty: penalty of words that stand there already
        image_greedy: take the likeliest image code
        image_temperature: temperature of image codes
        image_top_p: share of probability that image codes are sampled from
        guidance_scale_text: weight of the context's words while drawing
        guidance_scale_image: weight of the context's pictures while drawing
        min_images: pictures that have to come
        max_images: pictures that may come
    """

    ckpt: str
    output: Path
    prompt: str | None = None
    image: list[Path] | None = None
    input: Path | None = None
    mode: Mode = "any"
    adapter: Path | None = None
    base: str | None = None
    vqgan: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    complete: bool = False
    html: bool = False
    batch_size: int = 32
    max_new_tokens: int = GenerationOptions.max_new_tokens
    seed: int = GenerationOptions.seed
    text_greedy: bool = GenerationOptions.text_greedy
    text_temperature: float = GenerationOptions.text_temperature
    text_top_p: float = GenerationOptions.text_top_p
    repetition_penalty: float = GenerationOptions.repetition_penalty
    image_greedy: bool = GenerationOptions.image_greedy
    image_temperature: float = GenerationOptions.image_temperature
    image_top_p: float = GenerationOptions.image_top_p
    guidance_scale_text: float = GenerationOptions.guidance_scale_text
    guidance_scale_image: float = GenerationOptions.guidance_scale_image
    min_images: int = GenerationOptions.min_images
    max_images: int | None = GenerationOptions.max_images

    def generation(self) -> GenerationOptions:
        names = GenerationOptions.__dataclass_fields__
        return GenerationOptions(**{name: getattr(self, name) for name in names})


def read_prompts(options: GenerateOptions) -> list[Prompt | Document]:
    """The prompts of the flags or of the input file."""
    if (options.prompt is None) == (options.input is None):
        raise UserError("give either --prompt or --input")
    if options.prompt is not None:
        pictures = [Picture(path=path) for path in options.image or []]
        return [[*pictures, options.prompt]]
    if options.image:
        raise UserError("--image belongs to --prompt; in --input the lines name their pictures")
    assert options.input is not None
    return prompts_in(options.input)


def generate(options: GenerateOptions) -> None:
    chosen = options.generation()
    prompts = read_prompts(options)
    model = load(
        options.ckpt, options.device, options.dtype, options.adapter, options.base, options.vqgan
    )
    if chosen.mode != "text":
        model.image_tokenizer.require_decoder()
    if options.batch_size < 1:
        raise UserError(f"--batch_size is {options.batch_size}, expected 1 or more")
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    failed = 0
    for start in tqdm(range(0, len(prompts), options.batch_size), desc="generating", unit="batch"):
        batch = prompts[start : start + options.batch_size]
        numbers = range(start, start + len(batch))
        answers = answer_good(model, batch, chosen, options.complete, numbers)
        for number, answer in zip(numbers, answers, strict=True):
            failed += isinstance(answer, str)
            rows.append(save_answer(options.output, number, answer))
    with whole_file(options.output / "responses.jsonl") as temporary:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        temporary.write_text("".join(lines), encoding="utf-8")
    if options.html:
        with whole_file(options.output / "index.html") as temporary:
            temporary.write_text(page(rows), encoding="utf-8")
    for row in rows[:10]:
        print(json.dumps(row, ensure_ascii=False))
    print(f"{len(rows)} answers in {options.output}")
    if failed:
        reason = next(row["error"] for row in rows if "error" in row)
        raise DataLost(f"{failed} of {len(rows)} prompts failed: {reason} (see responses.jsonl)")


@dataclass(frozen=True)
class DoctorOptions:
    """Checks versions, devices and the embedded model."""


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "generate": (GenerateOptions, generate),
    "doctor": (DoctorOptions, lambda _: doctor()),
}


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        listed = "\n".join(
            f"  {name:10} {(kind.__doc__ or '').splitlines()[0]}"
            for name, (kind, _) in COMMANDS.items()
        )
        print(f"usage: medley COMMAND [flags]   (medley COMMAND --help lists them)\n\n{listed}")
        return 0 if words else 2
    if words[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        sys.stderr.write(f"medley: no command {words[0]!r}, there is {known}\n")
        return 2
    kind, work = COMMANDS[words[0]]
    return run_program(f"medley {words[0]}", kind, work, words[1:])


if __name__ == "__main__":
    sys.exit(main())
