"""Example messages of the web UI: phantoms for the embedded model, and the operator's own."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from medley.data.document import Document, DocumentError, ImagePart
from medley.data.vocabulary import IMAGE
from medley.errors import UserError
from medley.phantoms import CHANGE_QUESTION, Finding, Phantom, prompt_for
from medley.utils.jsonl import json_lines

MAX_EXAMPLES = 12


@dataclass(frozen=True)
class Example:
    """A message. Each `<image>` in the text is one of the files; other files come first."""

    text: str
    files: tuple[str, ...] = ()


def phantom_examples(folder: Path) -> list[Example]:
    """Questions about phantoms, and two requests for images. Writes the images to `folder`.

    The texts are those that the embedded model was trained on.
    """
    cyst = Finding("cyst", "large", "left", "upper")
    nodule = Finding("nodule", "large", "right", "lower")
    abscess = Finding("abscess", "large", "left", "lower")
    scans = [Phantom("CT", "head", (cyst,), 1), Phantom("X-ray", "chest", (nodule,), 2),
             Phantom("histology", "liver", (abscess,), 3)]  # fmt: skip
    questions = [
        "Where is the cyst?",
        "Describe the picture.",  # alias
        "How many findings are there?",
    ]
    images = [*scans, replace(scans[0], findings=(), seed=9)]
    paths = [folder / f"example-{number}.png" for number in range(len(images))]
    for scan, path in zip(images, paths, strict=True):
        scan.image(256).save(path)
    change = f"Before: {IMAGE} After: {IMAGE} {CHANGE_QUESTION}"
    return [
        *(Example(text, (str(path),)) for text, path in zip(questions, paths, strict=False)),
        Example(change, (str(paths[0]), str(paths[-1]))),
        Example(prompt_for(scans[0])),
        Example(f"Write an illustrated report of {scans[1].description}."),
    ]


def read_examples(path: Path) -> list[Example]:
    """The first question of each document of a documents file, with its images.

    Raises UserError with the line number of an invalid document.
    """
    examples: list[Example] = []
    for number, line in json_lines(path):
        try:
            document = Document.from_json(json.loads(line))
        except (DocumentError, ValueError) as error:
            raise UserError(f"{path}:{number}: {error}") from error
        turn = document.turns[0]
        files = [part.path for part in turn.parts if isinstance(part, ImagePart)]
        if turn.role != "user" or None in files:
            raise UserError(
                f"{path}:{number}: Not an example (expected a question whose images are given by "
                "path)."
            )
        image_paths = [path.parent / str(file) for file in files]
        for image_path in image_paths:
            if not image_path.is_file():
                raise UserError(f"{path}:{number}: Image {image_path} not found.")
        text = "".join(part if isinstance(part, str) else IMAGE for part in turn.parts)
        examples.append(Example(text, tuple(map(str, image_paths))))
        if len(examples) > MAX_EXAMPLES:
            raise UserError(f"{path}: Too many examples (limit {MAX_EXAMPLES}).")
    return examples
