"""The two ends of `training/pipeline.sh`: prompts from held-out data, and the page of results.

python -m training.pipeline_report prompts --data DIR --output DIR
python -m training.pipeline_report page --data DIR --output DIR --before tiny --after CKPT
"""

from __future__ import annotations

import base64
import html
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from tqdm import tqdm

from medley.data.document import Document, ImagePart, Turn
from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.images.preprocess import open_image
from medley.inference.loading import load
from medley.phantoms import (
    MODALITIES,
    Finding,
    Phantom,
    facts,
    facts_in,
    illustrated_report,
    measure,
    organs_of,
    prompt_for,
    signs_of,
)
from medley.utils.cli_options import run_program
from medley.utils.files import atomic_file, read_json, write_json
from medley.utils.jsonl import json_lines
from medley.utils.manifest import read_manifest

SHOWN = 8  # pictures of a row of the page
OTHER_SIGNS = (
    "<p>In scans of this modality ({}) each kind of finding looks as another one does in the "
    "modalities that the embedded model knows{}.</p>"
)
SIDES = ", and what is on the left lies on the right of the picture"


@dataclass(frozen=True)
class PromptOptions:
    """Writes the prompts that the pipeline generates from.

    Args:
        data: folder with test.jsonl
        output: folder of prompts-<mode>.jsonl
    """

    data: Path
    output: Path


def demo_scans(data: Path) -> list[Phantom]:
    """Scans to be asked for: of the modality that the data are of, and of tiny's own."""
    new = drawn_modality(data) or MODALITIES[0]
    wanted = [
        (new, 0, "nodule", "large", "left", "upper"),
        (new, 1, "cyst", "large", "right", "lower"),
        ("CT", 2, "abscess", "large", "left", "lower"),
        ("histology", 0, "cyst", "small", "right", "upper"),
    ]
    return [
        Phantom(modality, organs_of(modality)[organ], (Finding(kind, size, side, level),))
        for modality, organ, kind, size, side, level in wanted
    ]


def drawn_modality(data: Path) -> str | None:
    """What phantoms were drawn there, the first of several; None for real pictures."""
    drawn = read_manifest(data).get("options", {}).get("modality")
    return None if drawn is None else str(drawn).split(",")[0]


def write_prompts(options: PromptOptions) -> None:
    scans, place = demo_scans(options.data), ImagePart(codes=(0,))
    rows: dict[str, list[dict[str, Any]]] = {
        "image": [{"text": prompt_for(scan)} for scan in scans],
        "any": [{"text": illustrated_report(scan, place).turns[0].parts[0]} for scan in scans[::2]],
        "text": [],
    }
    for question in picked(list(questions(options.data)), SHOWN):
        picture, asked = question.document.turns[0].parts
        assert isinstance(picture, ImagePart)
        rows["text"].append({"text": f"<image>{asked}", "image_path": str(picture.path)})
    for mode, lines in rows.items():
        with atomic_file(options.output / f"prompts-{mode}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def picked(items: list[Any], count: int) -> list[Any]:
    return items[:: max(1, len(items) // count)][:count]


@dataclass(frozen=True)
class Question:
    """A question about a picture. `group` says what is scored together: closed or open, and of
    phantoms the new modality or those that the embedded model knows."""

    document: Document
    group: str

    @property
    def gold(self) -> str:
        return "".join(map(str, self.document.turns[1].parts)).strip()

    def is_right(self, answer: str) -> bool:
        return answer.lower() == self.gold.lower()


def questions(data: Path) -> Iterator[Question]:
    """The held-out ones of test.jsonl."""
    new = drawn_modality(data)
    for _, line in json_lines(data / "test.jsonl"):
        row = json.loads(line)
        group = str(row["answer_type"]).lower()
        if new is not None:
            group += f", {new if row['modality'] == new else 'modalities known before'}"
        yield Question(Document.from_json(row), group)


def usual_answers(data: Path) -> dict[str, str]:
    """Question -> its commonest answer in train.jsonl: what can be said without looking."""
    found: dict[str, Counter[str]] = {}
    for _, line in json_lines(data / "train.jsonl"):
        turns = Document.from_json(json.loads(line)).turns
        for asked, said in pairwise(turns):
            if asked.role == "user" and all(isinstance(part, str) for part in said.parts):
                words = "".join(map(str, said.parts)).strip()
                found.setdefault(asked_of(asked), Counter())[words] += 1
    return {asked: counts.most_common(1)[0][0] for asked, counts in found.items()}


def asked_of(turn: Turn) -> str:
    return "".join(part for part in turn.parts if isinstance(part, str)).strip()


@dataclass(frozen=True)
class PageOptions:
    """Answers the held-out questions with both models and writes the page.

    Args:
        data: folder with test.jsonl
        output: folder of the pipeline, where index.html goes
        before: checkpoint before training
        after: checkpoint after training
    """

    data: Path
    output: Path
    before: str
    after: str


def answers_of(ckpt: str, asked: list[Question]) -> list[str]:
    model = load(ckpt)
    options = GenerationOptions(
        mode="text", text_greedy=True, repetition_penalty=1.0, max_new_tokens=24
    )
    codes: dict[str, ImagePart] = {}  # a picture with many questions is encoded once

    def with_codes(picture: ImagePart) -> ImagePart:
        path = str(picture.path)
        if path not in codes:
            codes[path] = model.tokenize_image(picture)
        return codes[path]

    answers: list[str] = []
    for start in tqdm(range(0, len(asked), 64), desc=f"asking {ckpt}", unit="batch"):
        batch = [
            [with_codes(p) if isinstance(p, ImagePart) else p for p in one.document.turns[0].parts]
            for one in asked[start : start + 64]
        ]
        found = model.generate_responses(batch, [options] * len(batch), batch_size=64)
        answers += [answer.text.strip() for answer in found]
    return answers


def score(asked: list[Question], answers: list[str]) -> dict[str, dict[str, int]]:
    """Group -> exact matches, and of how many."""
    found: dict[str, dict[str, int]] = {}
    for one, answer in zip(asked, answers, strict=True):
        own = found.setdefault(one.group, {"right": 0, "n": 0})
        own["right"] += one.is_right(answer)
        own["n"] += 1
    return dict(sorted(found.items()))


def write_page(options: PageOptions) -> None:
    asked = list(questions(options.data))
    if not asked:
        raise UserError(f"{options.data / 'test.jsonl'}: no questions in it")
    usual = usual_answers(options.data)
    kinds: dict[str, Counter[str]] = {}  # for a question that nobody asked before
    for one in asked:
        kinds.setdefault(one.group, Counter())[one.gold] += 1
    blind = [
        usual.get(asked_of(one.document.turns[0])) or kinds[one.group].most_common(1)[0][0]
        for one in asked
    ]
    said = answers_of(options.after, asked)
    scores = {
        "before": score(asked, answers_of(options.before, asked)),
        "after": score(asked, said),
        "without looking": score(asked, blind),
    }
    with atomic_file(options.output / "index.html") as temporary:
        temporary.write_text(page(options, scores, wrong_answers(asked, said)), encoding="utf-8")
    write_json(options.output / "scores.json", scores)
    print(json.dumps(scores))


def page(options: PageOptions, scores: dict[str, Any], wrong: str) -> str:
    commands = (options.output / "commands.txt").read_text()
    modality = drawn_modality(options.data)
    told = ""
    if modality is not None and modality not in MODALITIES:
        told = OTHER_SIGNS.format(modality, SIDES if signs_of(modality).mirrored else "")
    style = (
        "body{font-family:sans-serif;max-width:64em;margin:2em auto;padding:0 1em;"
        "color-scheme:light dark}figure{display:inline-block;margin:.4em;width:11em;"
        "vertical-align:top;font-size:.85em}figure img{width:100%;image-rendering:pixelated}"
        "td,th{padding:.2em 1em;text-align:left}td{white-space:nowrap}"
        "pre{overflow:auto;font-size:.8em}"
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'><title>Medley: the whole way</title>"
        f"<style>{style}</style><h1>From pictures to mixed answers</h1>"
        f"{told}"
        "<h2>Pictures from text</h2><p>Compared with what is measured in their pixels.</p>"
        f"{generated(options, 'image')}"
        f"<h2>Answers about pictures</h2>{generated(options, 'text')}"
        f"<h2>Illustrated reports</h2>{generated(options, 'any')}"
        f"<h2>Held-out questions, exact answers</h2>{score_table(scores)}"
        f"<h2>Wrong answers among them</h2>{wrong}"
        f"<h2>Loss</h2>{loss_curve(options.output / 'lora' / 'trainer_state.json')}"
        f"<h2>The commands</h2><pre>{html.escape(commands)}</pre>"
        "<p>Research only, not for clinical decisions.</p></html>"
    )


def generated(options: PageOptions, mode: str) -> str:
    prompts = [json.loads(line) for _, line in json_lines(options.output / f"prompts-{mode}.jsonl")]
    folder = options.output / f"answers-{mode}"
    rows = [json.loads(line) for _, line in json_lines(folder / "responses.jsonl")]
    held_out: list[Question | None] = [None] * len(prompts)
    if mode == "text":
        held_out = [*picked(list(questions(options.data)), SHOWN)]
    figures = []
    for prompt, row, one in zip(prompts, rows, held_out, strict=True):
        shown = picture_tag(Path(prompt["image_path"])) if "image_path" in prompt else ""
        answer = " ".join(
            picture_tag(folder / part["file"]) + measured(folder / part["file"], prompt["text"])
            if part["type"] == "image"
            else f"<b>{html.escape(part['text'])}</b>"
            for part in row.get("parts", [])
        )
        note = html.escape(row.get("note") or row.get("error") or "")
        if one is not None:
            said = "".join(p["text"] for p in row.get("parts", []) if p["type"] == "text").strip()
            note += compared(one.is_right(said), f"right: {one.gold}")
        figures.append(figure(shown, prompt["text"].removeprefix("<image>"), answer + note))
    return "".join(figures)


def figure(shown: str, asked: str, answer: str) -> str:
    """Of tags of pictures, a plain question, and tags of an answer."""
    return f"<figure>{shown}<figcaption>{html.escape(asked)}</figcaption>{answer}</figure>"


def wrong_answers(asked: list[Question], answers: list[str]) -> str:
    """Some of the held-out questions that were answered wrongly, with their pictures."""
    wrong = [pair for pair in zip(asked, answers, strict=True) if not pair[0].is_right(pair[1])]
    figures = []
    for one, answer in picked(wrong, SHOWN):
        turn = one.document.turns[0]
        shown = "".join(
            picture_tag(Path(str(p.path))) for p in turn.parts if isinstance(p, ImagePart)
        )
        said = f"<b>{html.escape(answer)}</b>{compared(False, f'right: {one.gold}')}"
        figures.append(figure(shown, asked_of(turn), said))
    return "".join(figures) or "<p>None.</p>"


def compared(right: bool, why: str) -> str:
    return " &#10003;" if right else f" &#10007; ({html.escape(why)})"


def measured(path: Path, asked: str) -> str:
    """Whether a drawn picture shows what was asked for, as measured from its pixels."""
    seen = measure(np.asarray(open_image(path)))
    right = facts(seen.modality, seen.organ, seen.findings) == facts_in(asked)
    shown = Phantom(seen.modality, seen.organ, seen.findings).description
    return compared(right, f"measured: {shown}")


def picture_tag(path: Path) -> str:
    image = open_image(path)
    image.thumbnail((256, 256))
    return _png_tag(lambda buffer: image.save(buffer, "PNG"), path.name)


def _png_tag(save: Any, alt: str) -> str:
    buffer = io.BytesIO()
    save(buffer)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(alt)}' src='data:image/png;base64,{data}'>"


def score_table(scores: dict[str, Any]) -> str:
    rows = []
    for group in scores["before"]:
        cells = "".join(
            f"<td>{100 * own[group]['right'] / own[group]['n']:.1f} %</td>"
            for own in scores.values()
        )
        rows.append(
            f"<tr><th>{html.escape(group)} ({scores['before'][group]['n']})</th>{cells}</tr>"
        )
    head = (
        "<tr><th></th><th>before the adapter</th><th>after</th>"
        "<th>the usual answer, without looking</th></tr>"
    )
    return f"<table>{head}{''.join(rows)}</table>"


def loss_curve(state_file: Path) -> str:
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
    tag = _png_tag(lambda buffer: figure.savefig(buffer, dpi=120, bbox_inches="tight"), "loss")
    pyplot.close(figure)
    return tag


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["prompts"]:
        return run_program("training.pipeline_report", PromptOptions, write_prompts, words[1:])
    if words[:1] == ["page"]:
        return run_program("training.pipeline_report", PageOptions, write_page, words[1:])
    sys.stderr.write("training.pipeline_report: say `prompts` or `page` first\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
