"""A talk as the page keeps it: what was said, what is asked of the model, what is shown."""

from __future__ import annotations

import asyncio
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from medley.data.document import ContentPart, Document, Turn
from medley.data.vocabulary import IMAGE
from medley.serving.limits import Limits, RequestError
from medley.serving.ui.image_store import ImageStore, StoredImage

Shown = str | StoredImage
Standing = Literal["", "under way", "stopped", "failed"]


@dataclass(frozen=True)
class ChatMessage:
    """A message: words and pictures in their order, and a line below them. Of an answer, too: by
    which model, with which settings, and in `standing` whether it is not, or not all, what the
    model wanted to say."""

    role: Literal["user", "assistant"]
    parts: tuple[Shown, ...]
    note: str = ""
    model: str = ""
    standing: Standing = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class CancelToken:
    """How an answer under way is told that it is not wanted any more: all copies of its talk share
    one. `wanted` is set where it shall end, `forgotten` where what it says shall not be shown
    either; `taken` by the one answer that there is, and `ended` once that has changed the talk for
    the last time. All belong to the server's event loop."""

    wanted: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    forgotten: bool = False
    taken: bool = False


@dataclass(frozen=True)
class Conversation:
    """With one model. `tries` counts how often its last answer was asked for anew."""

    said: tuple[ChatMessage, ...] = ()
    tries: int = 0
    halt: CancelToken | None = None

    def asked(self, parts: Sequence[Shown]) -> Conversation:
        """With the user's next message; one that got no answer goes."""
        return Conversation(
            (*self._answered(), ChatMessage("user", tuple(parts))), halt=CancelToken()
        )

    def answer(self, answer: ChatMessage) -> Conversation:
        """With the answer to the last question in the place of the one that is there."""
        said = self.said[:-1] if self.said and self.said[-1].role == "assistant" else self.said
        return replace(self, said=(*said, answer))

    def again(self) -> Conversation:
        """Without the last answer, which is asked for anew."""
        if not self.said or self.said[-1].role == "user":
            return self
        return Conversation(self.said[:-1], self.tries + 1, CancelToken())

    def _answered(self) -> tuple[ChatMessage, ...]:
        """Without a last question that was not answered by anything."""
        if not self.said:
            return ()
        last = self.said[-1]
        if last.role == "user":
            return self.said[:-1]
        return self.said if last.parts else self.said[:-2]

    @property
    def waits(self) -> bool:
        return bool(self.said) and self.said[-1].role == "user"

    @property
    def under_way(self) -> bool:
        return bool(self.said) and self.said[-1].standing == "under way"

    @property
    def pictures(self) -> list[StoredImage]:
        return [part for said in self.said for part in said.parts if isinstance(part, StoredImage)]

    def document(self, part: Callable[[Shown, str], ContentPart]) -> Document:
        """What the model is asked; `part` reads one, and is told its place. Raises RequestError
        where nothing is asked."""
        if not self.waits:
            raise RequestError("nothing has been asked yet")
        return Document(
            tuple(
                Turn(said.role, tuple(part(shown, f"message {number}") for shown in said.parts))
                for number, said in enumerate(self.said, 1)
            )
        )


def parts_of(text: str, files: Sequence[str], limits: Limits, gallery: ImageStore) -> list[Shown]:
    """What somebody typed and dropped: pictures stand where `<image>` does, those without such a
    place before the text. Raises RequestError for what cannot be read, and for nothing at all."""
    if len(files) > limits.pictures:
        raise RequestError(f"{len(files)} pictures, the limit of a message is {limits.pictures}")
    texts = text.split(IMAGE)
    before = len(files) - (len(texts) - 1)
    if before < 0:
        raise RequestError(
            f"{len(texts) - 1} places for a picture ({IMAGE}), and {len(files)} pictures: add "
            "the missing ones, or take the places out"
        )
    pictures = [gallery.sent(file, limits) for file in files]
    parts: list[Shown] = [*pictures[:before]]
    for number, words in enumerate(texts):
        if number:
            parts.append(pictures[before + number - 1])
        if words.strip():
            parts.append(words.strip() if len(texts) == 1 else words)
    if not parts:
        raise RequestError("the message is empty: type something, or add a picture")
    return parts


# --- what is shown ----------------------------------------------------------------------------


def messages_of(talk: Conversation) -> list[dict[str, Any]]:
    """As Gradio's Chatbot takes them."""
    shown = [(said.role, list(_content(said))) for said in talk.said]
    return [{"role": role, "content": content} for role, content in shown if content]


def line_of(talk: Conversation) -> str:
    """The line below a talk, about its last answer."""
    last = talk.said[-1] if talk.said else None
    text = last.note if last is not None else ""
    return f'<p class="status">{html.escape(text)}</p>'


def _content(said: ChatMessage) -> Iterator[Any]:
    for part in said.parts:
        yield {"path": str(part.shown)} if isinstance(part, StoredImage) else part
    if said.standing == "failed":
        yield said.note
