"""The demo's HTML report: generated responses, scores before and after training, loss curves."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from tqdm import tqdm

from medley.data.document import ImagePart
from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.images.preprocess import open_image
from medley.inference.loading import load
from medley.phantoms import MODALITIES, Phantom, appearances_of, facts, facts_in, measure
from medley.utils.files import atomic_file, read_json, write_json
from medley.utils.html import data_url, render
from medley.utils.jsonl import json_lines
from training.demo.questions import (
    EXAMPLES,
    Question,
    Scores,
    image_blind_answers,
    phantom_modality,
    read_questions,
    sample_evenly,
    score,
)

BATCH = 64
_LONGEST = 256  # pixels


@dataclass(frozen=True)
class ReportOptions:
    """Answers the held-out questions with both models and writes the HTML report.

    Args:
        data: folder with train.jsonl and test.jsonl
        output: folder of the pipeline; receives index.html and scores.json
        before: checkpoint before training
        after: checkpoint after training
    """

    data: Path
    output: Path
    before: str
    after: str


@dataclass(frozen=True)
class Verdict:
    """Whether a part of a response is correct, with the expected or measured content."""

    correct: bool
    detail: str


@dataclass(frozen=True)
class Part:
    """A text or an image (as data URL) of a prompt or a response."""

    text: str = ""
    image: str = ""
    alt: str = ""
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Card:
    """A prompt and the response to it."""

    prompt: list[Part]
    response: list[Part]
    note: str = ""

    @property
    def is_correct(self) -> bool | None:
        """Whether all verdicts on the response are positive; None if there are no verdicts."""
        verdicts = [part.verdict.correct for part in self.response if part.verdict is not None]
        return all(verdicts) if verdicts else None


def write_report(options: ReportOptions) -> None:
    questions = list(read_questions(options.data))
    if not questions:
        raise UserError(f"{options.data / 'test.jsonl'}: The file contains no questions.")
    answers = answer_questions(options.after, questions)
    scores = {
        "before": score(questions, answer_questions(options.before, questions)),
        "after": score(questions, answers),
        "image_blind": score(questions, image_blind_answers(questions, options.data)),
    }
    with atomic_file(options.output / "index.html") as temporary:
        html = report_html(options, scores, wrong_answers(questions, answers))
        temporary.write_text(html, encoding="utf-8")
    write_json(options.output / "scores.json", scores)
    print(json.dumps(scores))


def answer_questions(ckpt: str, questions: Sequence[Question]) -> list[str]:
    model = load(ckpt)
    options = GenerationOptions(
        mode="text", text_greedy=True, repetition_penalty=1.0, max_new_tokens=24
    )
    tokenized: dict[str, ImagePart] = {}  # several questions share an image

    def tokenize(image: ImagePart) -> ImagePart:
        path = str(image.path)
        if path not in tokenized:
            tokenized[path] = model.tokenize_image(image)
        return tokenized[path]

    answers: list[str] = []
    for start in tqdm(range(0, len(questions), BATCH), desc=f"answers of {ckpt}", unit="batch"):
        prompts = [
            [tokenize(p) if isinstance(p, ImagePart) else p for p in each.document.turns[0].parts]
            for each in questions[start : start + BATCH]
        ]
        responses = model.generate_responses(prompts, [options] * len(prompts), batch_size=BATCH)
        answers += [response.text.strip() for response in responses]
    return answers


def report_html(options: ReportOptions, scores: dict[str, Scores], wrong: list[Card]) -> str:
    modality = phantom_modality(options.data)
    is_new = modality is not None and modality not in MODALITIES
    return render(
        "pipeline.html",
        "Medley: end-to-end pipeline",
        new_modality=modality if is_new else None,
        mirrored=modality is not None and appearances_of(modality).mirrored,
        images=generated_cards(options, "image"),
        answers=generated_cards(options, "text"),
        reports=generated_cards(options, "any"),
        groups=list(scores["before"]),
        scores=scores,
        wrong=wrong,
        loss_curve=loss_curve(options.output / "lora" / "trainer_state.json"),
        commands=(options.output / "commands.txt").read_text(),
    )


def generated_cards(options: ReportOptions, mode: str) -> list[Card]:
    """The responses of `medley generate` in one mode; text and images are checked."""
    prompts = [json.loads(line) for _, line in json_lines(options.output / f"prompts-{mode}.jsonl")]
    folder = options.output / f"answers-{mode}"
    rows = [json.loads(line) for _, line in json_lines(folder / "responses.jsonl")]
    questions: Sequence[Question | None] = [None] * len(prompts)
    if mode == "text":
        questions = sample_evenly(list(read_questions(options.data)), EXAMPLES)
    return [
        _generated_card(folder, prompt, row, question)
        for prompt, row, question in zip(prompts, rows, questions, strict=True)
    ]


def _generated_card(
    folder: Path, prompt: dict[str, Any], row: dict[str, Any], question: Question | None
) -> Card:
    text = prompt["text"]
    parts = [_image_part(Path(prompt["image_path"]))] if "image_path" in prompt else []
    response = []
    for part in row.get("parts", []):
        if part["type"] == "image":
            path = folder / part["file"]
            response.append(_image_part(path, check_image(path, text)))
        else:
            response.append(Part(text=part["text"]))
    if question is not None:
        answer = "".join(part.text for part in response).strip()
        verdict = Verdict(question.is_correct(answer), f"correct answer: {question.gold}")
        response.append(Part(verdict=verdict))
    note = row.get("note") or row.get("error") or ""
    return Card([*parts, Part(text=text.removeprefix("<image>"))], response, note)


def wrong_answers(questions: Sequence[Question], answers: Sequence[str]) -> list[Card]:
    """Examples of held-out questions with wrong answers."""
    pairs = [p for p in zip(questions, answers, strict=True) if not p[0].is_correct(p[1])]
    cards = []
    for question, answer in sample_evenly(pairs, EXAMPLES):
        parts = question.document.turns[0].parts
        images = [_image_part(Path(str(p.path))) for p in parts if isinstance(p, ImagePart)]
        verdict = Verdict(False, f"correct answer: {question.gold}")
        response = [Part(text=answer), Part(verdict=verdict)]
        cards.append(Card([*images, Part(text=question.text)], response))
    return cards


def check_image(path: Path, prompt: str) -> Verdict:
    """Compares the measured contents of a generated image with its prompt."""
    measured = measure(np.asarray(open_image(path)))
    correct = facts(measured.modality, measured.organ, measured.findings) == facts_in(prompt)
    scan = Phantom(measured.modality, measured.organ, measured.findings)
    return Verdict(correct, f"measured: {scan.description}")


def _image_part(path: Path, verdict: Verdict | None = None) -> Part:
    image = open_image(path)
    image.thumbnail((_LONGEST, _LONGEST))
    return Part(image=data_url(image), alt=path.name, verdict=verdict)


def loss_curve(state_file: Path) -> str:
    """The training and validation losses as a data URL."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    history = read_json(state_file)["log_history"]
    figure, axes = pyplot.subplots(figsize=(7, 3))
    for name in ("text_loss", "image_loss", "eval_text_loss", "eval_image_loss"):
        points = [(row["step"], row[name]) for row in history if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    axes.set_xlabel("step")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return data_url(Image.open(buffer))
