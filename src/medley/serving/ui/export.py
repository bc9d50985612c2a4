"""Conversations as files: JSON that can be sent to the server again, or a self-contained HTML file.

Both contain the images as they were displayed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from medley.serving.limits import RequestError
from medley.serving.ui.conversation import ChatMessage, Conversation, MessagePart
from medley.utils.html import render
from medley.version import __version__

DISCLAIMER = "Research only. Not for clinical decisions."
IMAGE_DELETED = "[image deleted]"


def to_json(conversations: Sequence[Conversation]) -> str:
    """Messages in OpenAI's format, and model, settings and note of each response."""
    content = {
        "made_by": f"medley {__version__}",
        "use": DISCLAIMER,
        "conversations": [_conversation_json(conversation) for conversation in conversations],
    }
    return json.dumps(content, ensure_ascii=False, indent=1)


def _conversation_json(conversation: Conversation) -> dict[str, Any]:
    messages = [message for message in conversation.messages if message.parts]
    return {
        "messages": [{"role": m.role, "content": list(map(_part_json, m.parts))} for m in messages],
        "responses": [
            {"message": number, "model": m.model, "settings": dict(m.settings), "note": m.note}
            for number, m in enumerate(messages) if m.role == "assistant"
        ],
    }  # fmt: skip


def _part_json(part: MessagePart) -> dict[str, Any]:
    values = _part_values(part)
    if "image" in values:
        return {"type": "image_url", "image_url": {"url": values["image"]}}
    return {"type": "text", "text": values["text"]}


def _part_values(part: MessagePart) -> dict[str, str]:
    """`text`, or the data URL of an `image`; a deleted image becomes text."""
    if isinstance(part, str):
        return {"text": part}
    try:
        return {"image": part.data_url}
    except RequestError:
        return {"text": IMAGE_DELETED}


def to_html(conversations: Sequence[Conversation]) -> str:
    return render(
        "conversation.html",
        "Conversation",
        conversations=[[_message_values(m) for m in c.messages] for c in conversations],
    )


def _message_values(message: ChatMessage) -> dict[str, Any]:
    settings = ", ".join(f"{name} {value}" for name, value in message.settings.items())
    return {
        "role": message.role,
        "author": "User" if message.role == "user" else message.model,
        "parts": list(map(_part_values, message.parts)),
        "lines": [line for line in (message.note, settings) if line],
    }
