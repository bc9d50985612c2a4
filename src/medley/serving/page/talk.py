"""A talk as the page keeps it: what was said, what is asked of the model, what is shown."""

from __future__ import annotations

import hashlib
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from medley.document import Document, Part, Picture, Turn
from medley.images import ImageError
from medley.serving.limits import Limits, RequestError
from medley.serving.pictures import read_unknown
from medley.vocabulary import IMAGE

Shown = str | Image.Image
Standing = Literal["", "under way", "stopped", "failed"]


@dataclass(frozen=True)
class Said:
    """A message: words and pictures in their order, and a line below them. `standing` is of an
    answer that is not, or not all, what the model wanted to say."""

    role: Literal["user", "assistant"]
    parts: tuple[Shown, ...]
    note: str = ""
    model: str = ""
    standing: Standing = ""


@dataclass(frozen=True)
class Talk:
    """With one model. `tries` counts how often its last answer was asked for anew."""

    said: tuple[Said, ...] = ()
    tries: int = 0

    def asked(self, parts: Sequence[Shown]) -> Talk:
        """With the user's next message; one that got no answer goes."""
        return Talk((*self.answered.said, Said("user", tuple(parts))))

    def answer(self, answer: Said) -> Talk:
        """With the answer to the last question in the place of the one that is there."""
        said = self.said[:-1] if self.said and self.said[-1].role == "assistant" else self.said
        return replace(self, said=(*said, answer))

    def again(self) -> Talk:
        """Without the last answer, which is asked for anew."""
        if not self.said or self.said[-1].role == "user":
            return self
        return Talk(self.said[:-1], self.tries + 1)

    @property
    def answered(self) -> Talk:
        """Without a last question that was not answered, or whose answer failed."""
        if self.said and (self.said[-1].role == "user" or not _counts(self.said[-1])):
            end = -1 if self.said[-1].role == "user" else -2
            return Talk(self.said[:end])
        return self

    @property
    def waits(self) -> bool:
        return bool(self.said) and self.said[-1].role == "user"

    def document(self) -> Document:
        """What the model is asked. Raises RequestError where nothing is."""
        if not self.waits:
            raise RequestError("nothing has been asked yet")
        return Document(tuple(Turn(s.role, tuple(map(_part, s.parts))) for s in self.said))


def _counts(said: Said) -> bool:
    return said.standing != "failed" and bool(said.parts)


def _part(shown: Shown) -> Part:
    return Picture(image=shown) if isinstance(shown, Image.Image) else shown


def parts_of(text: str, files: Sequence[str], limits: Limits) -> list[Shown]:
    """What somebody typed and dropped: pictures stand where `<image>` does, those without such a
    place before the text. Raises RequestError for what cannot be read, and for nothing at all."""
    if len(files) > limits.pictures:
        raise RequestError(f"{len(files)} pictures, the limit of a message is {limits.pictures}")
    pictures = [_read(Path(file), limits) for file in files]
    texts = text.split(IMAGE)
    before = len(pictures) - (len(texts) - 1)
    if before < 0:
        raise RequestError(
            f"{len(texts) - 1} places for a picture ({IMAGE}), and {len(pictures)} pictures: add "
            "the missing ones, or take the places out"
        )
    parts: list[Shown] = [*pictures[:before]]
    for number, words in enumerate(texts):
        if number:
            parts.append(pictures[before + number - 1])
        if words.strip():
            parts.append(words.strip() if len(texts) == 1 else words)
    if not parts:
        raise RequestError("the message is empty: type something, or add a picture")
    return parts


def _read(path: Path, limits: Limits) -> Image.Image:
    try:
        return read_unknown(path.read_bytes(), path.name, limits)
    except ImageError as error:
        raise RequestError(str(error)) from error


# --- what is shown ----------------------------------------------------------------------------


@dataclass
class Gallery:
    """Pictures of the talks as files in one folder, each once, for the browser to load."""

    folder: Path

    def keep(self, image: Image.Image) -> str:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        name = hashlib.sha256(buffer.getvalue()).hexdigest()[:32]
        path = self.folder / f"{name}.png"
        if not path.exists():
            path.write_bytes(buffer.getvalue())
        return str(path)


def messages_of(talk: Talk, gallery: Gallery) -> list[dict[str, Any]]:
    """As Gradio's Chatbot takes them."""
    shown = [(said.role, list(_content(said, gallery))) for said in talk.said]
    return [{"role": role, "content": content} for role, content in shown if content]


def line_of(talk: Talk) -> str:
    """The line below a talk, about its last answer; a screen reader tells of it as it changes."""
    last = talk.said[-1] if talk.said else None
    text = last.note if last is not None else ""
    return f'<p class="status" role="status" aria-live="polite">{html.escape(text)}</p>'


def _content(said: Said, gallery: Gallery) -> Any:
    for part in said.parts:
        if isinstance(part, Image.Image):
            yield {"path": gallery.keep(part)}
        else:
            yield part
    if said.standing == "failed":
        yield said.note
