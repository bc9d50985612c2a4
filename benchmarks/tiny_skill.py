"""The skills of the embedded model on phantoms that it was not trained on, by public commands.

    python benchmarks/tiny_skill.py [--ckpt tiny] [--scans 1000] [--layouts false]

`medley answer` and `medley evaluate vqa` handle questions; `medley generate` handles captions,
conversations, changes and images. Images are scored by measuring their pixels. The number of
possible scans is finite, so most random scans also occur in the training data: scans with a
combination of attributes that does not occur there are scored separately as well (`_held_out`).

Baselines in the same run: the majority answer to each question, captions without findings, images
without guidance, with the default settings, and from a prompt without contents. `--layouts`
measures the same model in Hugging Face's layout, and split into a base and an adapter. Each part's
scores are printed as soon as it ends; the last line is a JSON object with all scores.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from phantom_questions import (
    GREEDY,
    Model,
    Pair,
    Result,
    majority,
    question_majorities,
    question_scores,
    read_rows,
    run,
    work_folder,
    write_questions,
)
from PIL import Image
from tiny_layouts import make_layouts

import medley
from medley.generation import GenerationOptions
from medley.phantoms import (
    CHANGE_QUESTION,
    KINDS,
    Measurement,
    Phantom,
    article,
    caption,
    change_document,
    change_text,
    facts,
    facts_in,
    follow_up_questions,
    measure,
    prompt_for,
    questions,
)
from medley.phantoms.curriculum import training_descriptions
from medley.tiny.embedded import tiny_folder
from medley.utils.cli_options import Alias, run_program
from medley.utils.jsonl import write_jsonl

SEED = 40_000_000  # far from the seeds of training and of choosing settings
EMPTY_PROMPT = "Show me a scan."
MAX_RESIDUAL = 0.07  # an image with a larger residual counts as wrong in every respect
TURNS = 3  # of a conversation
Scores = dict[str, float]


@dataclass(frozen=True)
class Options:
    """Measures the skills of the embedded model.

    Args:
        ckpt: checkpoint in Chameleon's layout, or tiny
        scans: number of phantoms with questions
        questions: random questions per phantom
        images: number of generated images, with and without guidance
        guidance: text guidance scale
        image_temperature: temperature of image tokens, with and without guidance
        layouts: also measure Hugging Face's layout, and a base with an adapter
        keep: empty folder to keep all files in
        seed: seed of the phantoms
    """

    aliases: ClassVar = {"pictures": Alias("images")}  # alias
    ckpt: str = "tiny"
    scans: int = 1000
    questions: int = 5
    images: int = 1000
    guidance: float = 1.5
    image_temperature: float = 0.2
    layouts: bool = True
    keep: Path | None = None
    seed: int = SEED


def percent(hits: Sequence[bool]) -> float:
    return 100 * sum(hits) / max(len(hits), 1)


# --- text -------------------------------------------------------------------------------------


def generate(
    model: Model, folder: Path, name: str, rows: Sequence[dict[str, Any]], *flags: object
) -> list[dict[str, Any]]:
    """The rows of responses.jsonl."""
    name = f"{model.name}-{name}"
    prompts = folder / f"{name}.jsonl"
    write_jsonl(prompts, rows)
    run("medley", "generate", *model.flags, "--input", prompts, "--output", folder / name,
        "--batch_size", 64, *flags)  # fmt: skip
    return read_rows(folder / name / "responses.jsonl")


def generate_texts(
    model: Model, folder: Path, name: str, rows: Sequence[dict[str, Any]]
) -> list[str]:
    flags = ("--mode", "text", "--max_new_tokens", 80, *GREEDY)
    return [
        "".join(part["text"] for part in row["parts"] if part["type"] == "text").strip()
        for row in generate(model, folder, name, rows, *flags)
    ]


def agreement(gold: frozenset[str], predicted: frozenset[str]) -> float:
    """Fraction of correct facts; missing and invented facts both count against it."""
    return len(gold & predicted) / max(len(gold), len(predicted))


def captions(
    model: Model, folder: Path, scans: Sequence[Phantom], held_out: Sequence[bool]
) -> Scores:
    rows = [{"text": "<image>Describe the picture.",  # alias
             "image_path": image_path(folder, number)}
            for number in range(len(scans))]  # fmt: skip
    texts = generate_texts(model, folder, "captions", rows)
    golds = [caption(scan) for scan in scans]
    fractions = [agreement(facts_in(g), facts_in(t)) for g, t in zip(golds, texts, strict=True)]
    empty = [caption(replace(scan, findings=())) for scan in scans]
    baseline = [agreement(facts_in(g), facts_in(e)) for g, e in zip(golds, empty, strict=True)]
    of_held_out = [fraction for fraction, own in zip(fractions, held_out, strict=True) if own]
    return {
        "caption_facts": 100 * float(np.mean(fractions)),
        **({"caption_facts_held_out": 100 * float(np.mean(of_held_out))} if of_held_out else {}),
        "caption_facts_without_findings": 100 * float(np.mean(baseline)),
        "captions_exact_match": percent([g == t for g, t in zip(golds, texts, strict=True)]),
    }  # fmt: skip


def image_path(folder: Path, number: int) -> str:
    return str(folder / "images" / f"{number}.png")


def conversation_pairs(scan: Phantom, rng: np.random.Generator) -> list[Pair]:
    """The presence of a kind of finding, a follow-up if it is present, and any other question."""
    kind = KINDS[rng.integers(len(KINDS))]
    pairs = questions(scan)
    present = [finding for finding in scan.findings if finding.kind == kind]
    more = follow_up_questions(present[0]) if present else pairs
    first = (f"Is there {article(kind)} {kind}?", "yes" if present else "no")
    return [first, more[rng.integers(len(more))], pairs[rng.integers(len(pairs))]]


def conversations(model: Model, folder: Path, scans: Sequence[Phantom], seed: int) -> Scores:
    """Accuracy of each turn, with the model's own earlier answers as context.

    `follow_up` is the accuracy of second turns that depend on the first one, for scans with several
    findings.
    """
    rng = np.random.default_rng(seed)
    golds = [conversation_pairs(scan, rng) for scan in scans]
    messages: list[list[dict[str, str]]] = [[] for _ in scans]
    correct: list[list[bool]] = []
    for turn in range(TURNS):
        for number, own in enumerate(messages):
            image_token = "" if turn else "<image>"
            own.append({"role": "user", "content": image_token + golds[number][turn][0]})
        rows = [{"messages": own, "image_path": image_path(folder, number)}
                for number, own in enumerate(messages)]  # fmt: skip
        answers = generate_texts(model, folder, f"turn{turn}", rows)
        for own, answer in zip(messages, answers, strict=True):
            own.append({"role": "assistant", "content": answer})
        correct.append([pairs[turn][1] == a for pairs, a in zip(golds, answers, strict=True)])
    follow_ups = [
        number for number, scan in enumerate(scans)
        if golds[number][0][1] == "yes" and len(scan.findings) > 1
    ]  # fmt: skip
    scores = {f"turn_{turn + 1}": percent(hits) for turn, hits in enumerate(correct)}
    scores["all_turns"] = percent([all(hits) for hits in zip(*correct, strict=True)])
    scores["follow_up"] = percent([correct[1][number] for number in follow_ups])
    scores["follow_up_majority"] = majority([golds[number][1] for number in follow_ups])
    return scores


def changes(model: Model, folder: Path, scans: Sequence[Phantom], seed: int) -> Scores:
    """Accuracy of the change between two images."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    golds = []
    for number, scan in enumerate(scans):
        follow_up, change = scan.progression(rng)
        paths = [image_path(folder, number), str(folder / "images" / f"{number}_later.png")]
        follow_up.image(64).save(paths[1])
        before, after = (medley.ImagePart(path=path) for path in paths)
        turn = change_document(before, after, change).turns[0]
        text = "".join(part if isinstance(part, str) else "<image>" for part in turn.parts)
        rows.append({"text": text, "image_path": paths})
        golds.append(change_text(change))
    texts = generate_texts(model, folder, "changes", rows)
    return {
        "changes": percent([g == t for g, t in zip(golds, texts, strict=True)]),
        "changes_majority": majority([(CHANGE_QUESTION, gold) for gold in golds]),
    }


# --- images -----------------------------------------------------------------------------------


def check(scan: Phantom, measured: Measurement | None) -> dict[str, bool]:
    """Which attributes of a scan are correct in an image.

    None are if the image is missing or has a large residual.
    """
    if measured is None or measured.residual >= MAX_RESIDUAL:
        return dict.fromkeys(("intact", "modality", "organ", *_OF_FINDINGS, "all"), False)
    result = {"intact": True, "modality": scan.modality == measured.modality,
              "organ": scan.organ == measured.organ}  # fmt: skip
    for name, fields in _OF_FINDINGS.items():
        expected, actual = ({tuple(getattr(f, field) for field in fields) for f in s.findings}
                            for s in (scan, measured))  # fmt: skip
        result[name] = expected == actual
    gold = facts(scan.modality, scan.organ, scan.findings)
    result["all"] = gold == facts(measured.modality, measured.organ, measured.findings)
    return result


_OF_FINDINGS = {
    "kind": ("kind",), "kind_and_side": ("kind", "side"), "kind_and_level": ("kind", "level"),
    "kind_and_size": ("kind", "size"), "kind_and_brightness": ("kind", "brightness"),
}  # fmt: skip


def generate_images(
    model: Model, folder: Path, name: str, scans: Sequence[Phantom], prompts: Sequence[str],
    guidance: float, temperature: float,
) -> list[dict[str, bool]]:  # fmt: skip
    """The correct attributes of each generated image."""
    results = []
    rows = generate(
        model, folder, name, [{"text": text} for text in prompts], "--mode", "image",
        "--max_images", 1, "--guidance_scale_text", guidance, "--image_temperature", temperature,
    )  # fmt: skip
    for scan, row in zip(scans, rows, strict=True):
        files = [part["file"] for part in row.get("parts", ()) if part["type"] == "image"]
        measured = None
        if files:
            measured = measure(np.asarray(Image.open(folder / f"{model.name}-{name}" / files[0])))
        results.append(check(scan, measured))
    return results


def guided(
    model: Model, folder: Path, scans: Sequence[Phantom], held_out: Sequence[bool], options: Options
) -> Scores:
    prompts = [prompt_for(scan) for scan in scans]
    results = generate_images(
        model, folder, "guided", scans, prompts, options.guidance, options.image_temperature
    )
    scores = {f"generated_{name}": percent([r[name] for r in results]) for name in results[0]}
    own = [r["all"] for r, h in zip(results, held_out, strict=True) if h]
    return scores | ({"generated_all_held_out": percent(own)} if own else {})


def image_baselines(
    model: Model, folder: Path, scans: Sequence[Phantom], options: Options
) -> Scores:
    prompts, empty = [prompt_for(scan) for scan in scans], [EMPTY_PROMPT] * len(scans)
    default = GenerationOptions()
    settings = {
        "unguided": (prompts, 1.0, options.image_temperature),
        "by_default": (prompts, default.guidance_scale_text, default.image_temperature),
        "empty_prompt": (empty, 1.0, options.image_temperature),
    }
    return {
        f"generated_all_{name}": percent(
            [own["all"] for own in generate_images(model, folder, name, scans, *values)]
        )
        for name, values in settings.items()
    }


def reconstruction(ckpt: str, scans: Sequence[Phantom]) -> Scores:
    """The speed of rendering, and the accuracy of measuring scans and their reconstructions.

    The accuracy for reconstructions is an upper bound for generated images.
    """
    tokenizer = medley.ImageTokenizer.from_checkpoint(ckpt)
    start = time.perf_counter()
    images = [scan.image(tokenizer.size) for scan in scans]
    speed = len(scans) / (time.perf_counter() - start)
    psnr, measured, reconstructed = [], [], []
    for number in range(0, len(scans), 64):
        part = slice(number, number + 64)
        decoded = tokenizer.decode(tokenizer.encode(images[part]))
        for scan, before, after in zip(scans[part], images[part], decoded, strict=True):
            original, result = np.asarray(before), np.asarray(after)
            error = np.mean((original.astype(float) - result) ** 2)
            psnr.append(10 * np.log10(255**2 / error))
            measured.append(check(scan, measure(original))["all"])
            reconstructed.append(check(scan, measure(result))["all"])
    return {
        "scans_a_second": speed, "measured_all": percent(measured),
        "psnr_db": float(np.mean(psnr)), "reconstructed_all": percent(reconstructed),
    }  # fmt: skip


# --- the benchmark ----------------------------------------------------------------------------


def find_held_out(ckpt: str, scans: Sequence[Phantom]) -> list[bool]:
    """Whether each scan's combination of attributes is missing in the training data.

    False for all scans if the model has no training log.
    """
    log_file = (tiny_folder() if ckpt == "tiny" else Path(ckpt)) / "training_log.json"
    if not log_file.exists():
        return [False] * len(scans)
    log = json.loads(log_file.read_text())
    trained_on = training_descriptions(log["options"]["seed"], log["chunks"])
    return [scan.description not in trained_on for scan in scans]


def work(options: Options) -> None:
    start = time.monotonic()
    rng = np.random.default_rng(options.seed)
    scans = [Phantom.random(rng) for _ in range(options.scans)]
    held_out = find_held_out(options.ckpt, scans)
    groups = [{"modality": scan.modality, "combination": "held_out" if own else "seen"}
              for scan, own in zip(scans, held_out, strict=True)]  # fmt: skip
    count = min(options.images, len(scans))
    result = Result({
        "benchmark": "tiny_skill", "ckpt": options.ckpt, "scans": options.scans,
        "held_out": sum(held_out), "questions": options.questions, "images": count,
        "guidance": options.guidance, "image_temperature": options.image_temperature,
    })  # fmt: skip
    with work_folder(options.keep) as folder:
        write_questions(folder, scans, options.questions, options.seed + 2, groups)
        model = Model("pth", options.ckpt)
        result.add(reconstruction(options.ckpt, scans))
        result.add(question_scores(folder, model) | question_majorities(folder))
        result.add(captions(model, folder, scans, held_out))
        result.add(conversations(model, folder, scans, options.seed + 1))
        result.add(changes(model, folder, scans, options.seed + 3))
        result.add(guided(model, folder, scans[:count], held_out[:count], options))
        result.add(image_baselines(model, folder, scans[:count], options))
        for other in make_layouts(options.ckpt, folder) if options.layouts else ():
            suffix = f"_{other.name}"
            result.add(question_scores(folder, other), suffix)
            if suffix != "_base_without_adapter":
                result.add(captions(other, folder, scans, held_out), suffix)
                result.add(conversations(other, folder, scans, options.seed + 1), suffix)
                result.add(changes(other, folder, scans, options.seed + 3), suffix)
                result.add(guided(other, folder, scans[:count], held_out[:count], options), suffix)
    result["seconds"] = round(time.monotonic() - start, 1)
    result.print()


if __name__ == "__main__":
    sys.exit(run_program("benchmarks/tiny_skill.py", Options, work))
