"""A conversation of the web UI: its messages, the document for the model, the display in Gradio."""

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

MessagePart = str | StoredImage
Settings = Mapping[str, Any]  # values of the UI's settings, by name
ChatbotMessage = dict[str, Any]  # a message as Gradio's Chatbot displays it


@dataclass(frozen=True)
class ChatMessage:
    """A message of text and images.

    Attributes:
        note: line below the conversation, about a response
        model: name of the model that generated a response
        status: "" for a complete message, else why a response is incomplete
        settings: settings that a response was generated with
    """

    role: Literal["user", "assistant"]
    parts: tuple[MessagePart, ...]
    note: str = ""
    model: str = ""
    status: Literal["", "generating", "stopped", "failed"] = ""
    settings: Settings = field(default_factory=dict)


@dataclass(eq=False)
class CancelToken:
    """Cancels the generation of a response; all copies of a conversation share it.

    Only the server's event loop uses it.

    Attributes:
        requested: set to stop the generation
        finished: set after the last update of the conversation
        discard: whether further updates must not be displayed
        started: whether a generation uses the token; there is one for each token
    """

    requested: asyncio.Event = field(default_factory=asyncio.Event)
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    discard: bool = False
    started: bool = False


@dataclass(frozen=True)
class Conversation:
    """Messages of a user and a model. `attempts` counts regenerations of the last response."""

    messages: tuple[ChatMessage, ...] = ()
    attempts: int = 0
    cancel: CancelToken | None = None

    def with_user_message(self, parts: Sequence[MessagePart]) -> Conversation:
        """Appends a user message; replaces a last message that has no response."""
        message = ChatMessage("user", tuple(parts))
        return Conversation((*self._complete_messages(), message), cancel=CancelToken())

    def with_response(self, response: ChatMessage) -> Conversation:
        """Appends the response, or replaces the present one."""
        has_response = bool(self.messages) and self.messages[-1].role == "assistant"
        before = self.messages[:-1] if has_response else self.messages
        return replace(self, messages=(*before, response))

    def without_response(self) -> Conversation:
        """Removes the last response, to generate another one."""
        if not self.messages or self.messages[-1].role == "user":
            return self
        return Conversation(self.messages[:-1], self.attempts + 1, CancelToken())

    def _complete_messages(self) -> tuple[ChatMessage, ...]:
        """The messages without a last user message that has no response, or an empty one."""
        if not self.messages:
            return ()
        last = self.messages[-1]
        if last.role == "user":
            return self.messages[:-1]
        return self.messages if last.parts else self.messages[:-2]

    @property
    def needs_response(self) -> bool:
        return bool(self.messages) and self.messages[-1].role == "user"

    @property
    def is_generating(self) -> bool:
        return bool(self.messages) and self.messages[-1].status == "generating"

    @property
    def images(self) -> list[StoredImage]:
        parts = [part for message in self.messages for part in message.parts]
        return [part for part in parts if isinstance(part, StoredImage)]

    def to_document(self, read_part: Callable[[MessagePart, str], ContentPart]) -> Document:
        """The prompt. `read_part` converts a part, given its location for error messages.

        Raises RequestError if the last message is not the user's.
        """
        if not self.needs_response:
            raise RequestError("The conversation has no question to respond to.")
        turns = []
        for number, message in enumerate(self.messages, 1):
            parts = tuple(read_part(part, f"message {number}") for part in message.parts)
            turns.append(Turn(message.role, parts))
        return Document(tuple(turns))


def parse_message(
    text: str, files: Sequence[str], limits: Limits, store: ImageStore
) -> list[MessagePart]:
    """Text and uploaded files of a message -> parts in their order.

    Each `<image>` in the text becomes an image; images without an `<image>` come first. Raises
    RequestError for an empty message, and for files that are not images within the limits.
    """
    if len(files) > limits.max_images:
        raise RequestError(
            f"Too many images in one message (got {len(files)}, limit {limits.max_images})."
        )
    texts = text.split(IMAGE)
    first = len(files) - (len(texts) - 1)  # images before the text
    if first < 0:
        raise RequestError(
            f"The message has {len(texts) - 1} {IMAGE}, but {len(files)} images. Add the missing "
            f"images, or remove {IMAGE}."
        )
    images = [store.add_upload(file, limits) for file in files]
    parts: list[MessagePart] = [*images[:first]]
    for number, piece in enumerate(texts):
        if number:
            parts.append(images[first + number - 1])
        if piece.strip():
            parts.append(piece.strip() if len(texts) == 1 else piece)
    if not parts:
        raise RequestError("The message is empty. Type some text, or add an image.")
    return parts


# --- display ----------------------------------------------------------------------------------


def chatbot_messages(conversation: Conversation) -> list[ChatbotMessage]:
    """Messages for Gradio's Chatbot."""
    messages = [(m.role, list(_chatbot_content(m))) for m in conversation.messages]
    return [{"role": role, "content": content} for role, content in messages if content]


def note_html(conversation: Conversation) -> str:
    """The line below a conversation."""
    text = conversation.messages[-1].note if conversation.messages else ""
    return f'<p class="status">{html.escape(text)}</p>'


def _chatbot_content(message: ChatMessage) -> Iterator[str | dict[str, str]]:
    for part in message.parts:
        yield {"path": str(part.display_path)} if isinstance(part, StoredImage) else part
    if message.status == "failed":
        yield message.note
