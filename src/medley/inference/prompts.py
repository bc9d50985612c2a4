"""Prompts from files, folders, URLs and typed lines."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

from medley.data.document import Document, DocumentError, ImagePart
from medley.data.document_json import read_document
from medley.data.vocabulary import END_TURN
from medley.errors import UserError
from medley.images.remote import fetch_image, is_http_url
from medley.images.sources import ImageList
from medley.inference.interface import Prompt
from medley.inference.model import Model
from medley.utils.jsonl import json_lines

_FOLDER_PARTITION = 1000  # images of a folder that are listed at a time
_TEXT_RESERVE = 100  # tokens of the context that images must leave for text
_TYPED_IMAGE = re.compile(r'(?:(?<=\s)|^)@(?:"([^"]+)"|(\S+))')


def read_prompts(path: Path) -> list[Prompt | Document]:
    """The prompts of a JSON Lines file.

    A line is like that of a documents file: `text` with one `<image>` for each `image_path`,
    `messages` that end with the user's, or another layout of `document_json`. Notes on the lines
    are counted on stderr. Raises UserError with file and line for an invalid one.
    """
    prompts: list[Prompt | Document] = []
    remarks: Counter[str] = Counter()
    for number, line in json_lines(path):
        where = f"{path}:{number}"
        try:
            read = read_document(json.loads(line))
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: Invalid JSON ({error}).") from error
        except DocumentError as error:
            raise UserError(f"{where}: {error}") from error
        document = read.document
        remarks.update(read.remarks)
        if len(document.turns) % 2 == 0:
            raise UserError(
                f"{where}: The conversation ends with a response, expected the user's turn. "
                f"Remove {END_TURN} and the text after it."
            )
        is_single_turn = len(document.turns) == 1
        prompts.append(list(document.turns[0].parts) if is_single_turn else document)
    if not prompts:
        raise UserError(f"{path}: The file contains no prompts.")
    for remark, count in remarks.items():
        print(f"{path}: {remark}: {count} times", file=sys.stderr)
    return prompts


def parse_typed_prompt(line: str) -> list[str | ImagePart]:
    """A typed line -> its text and images in order. `@FILE` or `@"FILE"` is an image."""
    parts: list[str | ImagePart] = []
    end = 0
    for match in _TYPED_IMAGE.finditer(line):
        text = line[end : match.start()].strip()
        parts += [text] if text else []
        parts.append(ImagePart(path=match[1] or match[2]))
        end = match.end()
    text = line[end:].strip()
    return [*parts, text] if text else parts


def fetch_images(prompt: Prompt | Document, allow_network: bool) -> Prompt | Document:
    """Downloads the images of a prompt that are given by a URL.

    Raises UserError for a URL if the network is not allowed.
    """
    if isinstance(prompt, Document):
        return prompt.map_images(lambda part: fetch_image_part(part, allow_network))
    return [
        fetch_image_part(part, allow_network) if isinstance(part, ImagePart) else part
        for part in prompt
    ]


def fetch_image_part(part: ImagePart, allow_network: bool) -> ImagePart:
    """`fetch_images` for one image."""
    name = str(part.path)
    if part.path is None or not is_http_url(name) or Path(name).exists():
        return part
    if not allow_network:
        raise UserError(f"{name}: This is a URL. Use --allow_network to download it.")
    return ImagePart(image=fetch_image(name))


def folder_images(folder: Path, limit: int | None) -> list[ImagePart]:
    """The images of a folder, with all slices of volumes; at most `limit`, evenly spaced."""
    sources = [
        source
        for partition in ImageList(folder).partitions(_FOLDER_PARTITION)
        for source in partition.select_frames("all").sources
    ]
    count = min(limit or len(sources), len(sources))
    selected = (sources[i * len(sources) // count] for i in range(count))
    return [ImagePart(image=source.open()) for source in selected]


def check_context_room(model: Model, folder: Path, prompt: Prompt | Document) -> None:
    """Prints how many images fit. Raises UserError if those of the prompt exceed the context."""
    parts = prompt.turns[0].parts if isinstance(prompt, Document) else prompt
    count = sum(isinstance(part, ImagePart) for part in parts)
    tokens = model.image_tokenizer.codes_per_image + 2
    limit = (model.engine.max_seq_len - _TEXT_RESERVE) // tokens
    print(f"{folder}: {count} images of {tokens} tokens; the context has room for {limit}")
    if count > limit:
        raise UserError(
            f"{folder}: The folder has {count} images, the context of {model.engine.max_seq_len} "
            f"tokens has room for {limit}. Use --image_limit {limit} to select that many, evenly "
            "spaced."
        )
