"""What the page offers to try: drawn scans of the embedded model's world, and the owner's own."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from medley.data.document import Document, DocumentError, ImagePart
from medley.data.vocabulary import IMAGE
from medley.errors import UserError
from medley.phantoms import Phantom, prompt_for
from medley.phantoms.world import Finding
from medley.utils.jsonl import json_lines

MOST = 12  # of the owner's: more are no help


@dataclass(frozen=True)
class Example:
    """A message: `<image>` stands where a picture does."""

    text: str
    files: tuple[str, ...] = ()


def phantom_examples(folder: Path) -> list[Example]:
    """A question about each of some scans, one about a change, and two to draw; their pictures go
    to `folder`."""
    cyst = Finding("cyst", "large", "left", "upper")
    nodule = Finding("nodule", "large", "right", "lower")
    abscess = Finding("abscess", "large", "left", "lower")
    scans = [Phantom("CT", "head", (cyst,), 1), Phantom("X-ray", "chest", (nodule,), 2),
             Phantom("histology", "liver", (abscess,), 3)]  # fmt: skip
    asked = ["Where is the cyst?", "Describe the picture.", "How many findings are there?"]
    drawn = [*scans, replace(scans[0], findings=(), seed=9)]
    paths = [folder / f"example-{number}.png" for number in range(len(drawn))]
    for scan, path in zip(drawn, paths, strict=True):
        scan.image(256).save(path)
    found = [Example(text, (str(path),)) for text, path in zip(asked, paths, strict=False)]
    change = f"Before: {IMAGE} After: {IMAGE} What has changed?"
    return [
        *found, Example(change, (str(paths[0]), str(paths[-1]))), Example(prompt_for(scans[0])),
        Example(f"Write an illustrated report of {scans[1].description}."),
    ]  # fmt: skip


def read_examples(path: Path) -> list[Example]:
    """The first question of each line of a documents file, with its pictures. Raises UserError with
    the line that is none."""
    found: list[Example] = []
    for number, line in json_lines(path):
        try:
            document = Document.from_json(json.loads(line))
        except (DocumentError, ValueError) as error:
            raise UserError(f"{path}:{number}: {error}") from error
        turn = document.turns[0]
        files = [part.path for part in turn.parts if isinstance(part, ImagePart)]
        if turn.role != "user" or None in files:
            raise UserError(f"{path}:{number}: expected a question, with its pictures by path")
        places = [path.parent / str(file) for file in files]
        for place in places:
            if not place.is_file():
                raise UserError(f"{path}:{number}: {place} is not there")
        text = "".join(part if isinstance(part, str) else IMAGE for part in turn.parts)
        found.append(Example(text, tuple(map(str, places))))
        if len(found) > MOST:
            raise UserError(f"{path}: more than {MOST} examples, which nobody reads")
    return found
