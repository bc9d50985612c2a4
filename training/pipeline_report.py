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
from pathlib import Path
from typing import Any

import matplotlib
from tqdm import tqdm

from medley.document import Document, Picture
from medley.errors import UserError
from medley.files import json_lines, read_json, read_manifest, whole_file, write_json
from medley.generation import GenerationOptions
from medley.images import open_image
from medley.loading import load
from medley.options import run_program
from medley.phantoms import (
    MODALITIES,
    Finding,
    Phantom,
    illustrated_report,
    organs_of,
    request,
    signs_of,
)

SHOWN = 8  # pictures of a row of the page
MIRRORED = (
    "<p>These scans ({}) are mirrored: what is on the left lies on the right of the picture. "
    "Findings look otherwise here than in the scans that the embedded model knows, too: a nodule "
    "is dark, an abscess bright, a cyst has a bright rim.</p>"
)


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
    """Scans to be asked for: of the modality that the data are of, or of tiny's own."""
    modality = drawn_modality(data) or MODALITIES[0]
    wanted = [
        (0, "nodule", "large", "left", "upper"),
        (1, "cyst", "large", "right", "lower"),
        (2, "abscess", "large", "left", "lower"),
        (0, "cyst", "small", "right", "upper"),
    ]
    return [
        Phantom(modality, organs_of(modality)[organ], (Finding(kind, size, side, level),))
        for organ, kind, size, side, level in wanted
    ]


def drawn_modality(data: Path) -> str | None:
    """What phantoms were drawn there, the first of several; None for real pictures."""
    drawn = read_manifest(data).get("options", {}).get("modality")
    return None if drawn is None else str(drawn).split(",")[0]


def write_prompts(options: PromptOptions) -> None:
    scans, place = demo_scans(options.data), Picture(codes=(0,))
    rows: dict[str, list[dict[str, Any]]] = {
        "image": [{"text": request(scan)} for scan in scans],
        "any": [{"text": illustrated_report(scan, place).turns[0].parts[0]} for scan in scans[:2]],
        "text": [],
    }
    for document, _ in picked(list(questions(options.data / "test.jsonl")), SHOWN):
        picture, question = document.turns[0].parts
        assert isinstance(picture, Picture)
        rows["text"].append({"text": f"<image>{question}", "image_path": str(picture.path)})
    for mode, lines in rows.items():
        with whole_file(options.output / f"prompts-{mode}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def picked(items: list[Any], count: int) -> list[Any]:
    return items[:: max(1, len(items) // count)][:count]


def questions(path: Path) -> Iterator[tuple[Document, str]]:
    """Questions with pictures, and what kind each is: CLOSED or OPEN."""
    for _, line in json_lines(path):
        row = json.loads(line)
        yield Document.from_json(row), str(row["answer_type"])


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


def accuracy(ckpt: str, asked: list[tuple[Document, str]]) -> dict[str, Any]:
    """Exact matches by kind of question, and the answers themselves."""
    model = load(ckpt)
    options = GenerationOptions(
        mode="text", text_greedy=True, repetition_penalty=1.0, max_new_tokens=24
    )
    codes: dict[str, Picture] = {}  # a picture with many questions is encoded once

    def with_codes(picture: Picture) -> Picture:
        path = str(picture.path)
        if path not in codes:
            codes[path] = model.with_codes(picture)
        return codes[path]

    answers: list[str] = []
    for start in tqdm(range(0, len(asked), 64), desc=f"asking {ckpt}", unit="batch"):
        batch = [
            [with_codes(p) if isinstance(p, Picture) else p for p in document.turns[0].parts]
            for document, _ in asked[start : start + 64]
        ]
        found = model.answer_batch(batch, [options] * len(batch), batch_size=64)
        answers += [answer.text.strip() for answer in found]
    gold = ["".join(map(str, document.turns[1].parts)).lower() for document, _ in asked]
    right = [a.lower() == g for a, g in zip(answers, gold, strict=True)]
    scores: dict[str, Any] = {"answers": answers}
    for kind in ("CLOSED", "OPEN"):
        own = [hit for hit, (_, k) in zip(right, asked, strict=True) if k == kind]
        if own:
            answers_of_kind = [g for g, (_, k) in zip(gold, asked, strict=True) if k == kind]
            commonest = Counter(answers_of_kind).most_common(1)[0][1]
            scores[kind] = {"right": sum(own), "n": len(own), "always_the_commonest": commonest}
    return scores


def write_page(options: PageOptions) -> None:
    asked = list(questions(options.data / "test.jsonl"))
    if not asked:
        raise UserError(f"{options.data / 'test.jsonl'}: no questions in it")
    scores = {
        name: accuracy(ckpt, asked)
        for name, ckpt in (("before", options.before), ("after", options.after))
    }
    with whole_file(options.output / "index.html") as temporary:
        temporary.write_text(page(options, scores), encoding="utf-8")
    for score in scores.values():
        del score["answers"]
    write_json(options.output / "scores.json", scores)
    print(json.dumps(scores))


def page(options: PageOptions, scores: dict[str, Any]) -> str:
    commands = (options.output / "commands.txt").read_text()
    modality = drawn_modality(options.data)
    mirrored = modality is not None and signs_of(modality).mirrored
    style = (
        "body{font-family:sans-serif;max-width:64em;margin:2em auto;padding:0 1em;"
        "color-scheme:light dark}figure{display:inline-block;margin:.4em;width:11em;"
        "vertical-align:top;font-size:.85em}figure img{width:100%;image-rendering:pixelated}"
        "td,th{padding:.2em 1em;text-align:left}pre{overflow:auto;font-size:.8em}"
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'><title>Medley: the whole way</title>"
        f"<style>{style}</style><h1>From pictures to mixed answers</h1>"
        f"{MIRRORED.format(modality) if mirrored else ''}"
        f"<h2>Pictures from text</h2>{generated(options, 'image')}"
        f"<h2>Answers about pictures</h2>{generated(options, 'text')}"
        f"<h2>Illustrated reports</h2>{generated(options, 'any')}"
        f"<h2>Held-out questions, exact answers</h2>{score_table(scores)}"
        f"<h2>Loss</h2>{loss_curve(options.output / 'lora' / 'trainer_state.json')}"
        f"<h2>The commands</h2><pre>{html.escape(commands)}</pre>"
        "<p>Research only, not for clinical decisions.</p></html>"
    )


def generated(options: PageOptions, mode: str) -> str:
    prompts = [json.loads(line) for _, line in json_lines(options.output / f"prompts-{mode}.jsonl")]
    folder = options.output / f"answers-{mode}"
    rows = [json.loads(line) for _, line in json_lines(folder / "responses.jsonl")]
    figures = []
    for prompt, row in zip(prompts, rows, strict=True):
        asked = html.escape(prompt["text"].removeprefix("<image>"))
        shown = picture_tag(Path(prompt["image_path"])) if "image_path" in prompt else ""
        answer = "".join(
            picture_tag(folder / part["file"])
            if part["type"] == "image"
            else f"<b>{html.escape(part['text'])}</b>"
            for part in row.get("parts", [])
        )
        note = html.escape(row.get("note") or row.get("error") or "")
        figures.append(f"<figure>{shown}<figcaption>{asked}</figcaption>{answer}{note}</figure>")
    return "".join(figures)


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
    for kind in ("CLOSED", "OPEN"):
        if kind in scores["before"]:
            cells = "".join(
                f"<td>{100 * s[kind]['right'] / s[kind]['n']:.1f} % of {s[kind]['n']}</td>"
                for s in (scores["before"], scores["after"])
            )
            own = scores["before"][kind]
            cells += f"<td>{100 * own['always_the_commonest'] / own['n']:.1f} %</td>"
            rows.append(f"<tr><th>{kind.lower()}</th>{cells}</tr>")
    head = (
        "<tr><th></th><th>before the adapter</th><th>after</th>"
        "<th>always the commonest answer</th></tr>"
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
