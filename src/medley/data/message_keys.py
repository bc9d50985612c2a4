"""Keys beside the words of a conversation: weights, tools, other media, and what is not read."""

from __future__ import annotations

from typing import Any

from medley.data.document import DocumentError, shorten

# OpenAI, LLaMA-Factory, ms-swift (two), axolotl (two): whether a message is trained on
WEIGHT_KEYS = ("weight", "loss_weight", "loss", "loss_scale", "train", "training")
_MESSAGE_KEYS = frozenset(("role", "content", *WEIGHT_KEYS))
_REFUSED_IN_MESSAGE = {
    "tool_calls": "Tool calls are unsupported",
    "function_call": "Tool calls are unsupported",
    "tool_call_id": "Tool calls are unsupported",
    "train_detail": "Weights for parts of a message are unsupported",
    "training_detail": "Weights for parts of a message are unsupported",
    **dict.fromkeys(("audio", "audios"), "Audio is unsupported"),
    **dict.fromkeys(("video", "videos"), "Video is unsupported"),
    **dict.fromkeys(
        ("image", "images", "image_url", "image_path"),
        "Images inside a message must be parts of its 'content', or in 'images' of the record",
    ),
}
_REFUSED_IN_ROW = {
    **dict.fromkeys(("tools", "functions"), "Tool calls are unsupported"),
    **dict.fromkeys(("audio", "audios"), "Audio is unsupported"),
    **dict.fromkeys(("video", "videos"), "Video is unsupported"),
}
_UNDESIRED = ("kto_tag", "label")  # false for an answer that a model should not give
# Keys of records that hold words of a conversation, though not in a document
_WORDS_IN_ROW = frozenset((
    "system", "system_prompt", "text", "messages", "prompt", "conversations", "instruction",
    "query", "history", "response", "completion", "output", "chosen", "rejected",
    "rejected_response", "rejected_messages", "reasoning", "thinking",
))  # fmt: skip


def check_row(row: dict[str, Any]) -> None:
    """Raises DocumentError for a row with other media or tools, or with an undesired answer."""
    for name in row.keys() & _REFUSED_IN_ROW.keys():
        if row[name]:
            raise DocumentError(f"{_REFUSED_IN_ROW[name]} (got {name!r}). Leave out this record.")
    for name in _UNDESIRED:
        if row.get(name) is False:
            raise DocumentError(
                f"{name!r} is false, so the answer is one that a model should not give. Leave out "
                "this record."
            )


def unread_row_keys(row: dict[str, Any], used: frozenset[str]) -> list[str]:
    """A remark for each key that holds words of a conversation and is not read."""
    return [
        f"key {name!r} is not read"
        for name in sorted(row.keys() & _WORDS_IN_ROW - used)
        if row[name] not in (None, "", [], {})
    ]


def check_message(message: Any, number: int) -> list[str]:
    """A remark for each key of a message that is not read. Raises DocumentError for a bad one."""
    if not isinstance(message, dict):
        raise DocumentError(f"Message {number} is not an object, and lacks 'role' or 'content'.")
    if message.keys() == {"role", "content"}:
        return []
    for name in message.keys() & _REFUSED_IN_MESSAGE.keys():
        if message[name]:
            raise DocumentError(f"Message {number}: {_REFUSED_IN_MESSAGE[name]} (got {name!r}).")
    if "role" not in message or "content" not in message:
        raise DocumentError(
            f"Message {number} lacks 'role' or 'content' (got {', '.join(map(repr, message))})."
        )
    return [
        f"message key {name!r} is not read"
        for name in message
        if name not in _MESSAGE_KEYS and message[name] not in (None, "", [], {})
    ]


def is_trained(message: dict[str, Any], number: int) -> bool | None:
    """Whether a message is trained on, by its weight; None if it has no weight.

    Raises DocumentError for other weights than 0 and 1, and for two that differ.
    """
    weights: dict[str, bool] = {}
    for name in WEIGHT_KEYS:
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DocumentError(
                f"Message {number}: {name!r} is {shorten(repr(value), 60)} (expected 0 or 1, or "
                "true or false). Fractional weights are unsupported."
            )
        weights[name] = bool(value)
    if len(set(weights.values())) > 1:
        raise DocumentError(
            f"Message {number}: {', '.join(map(repr, weights))} contradict each other. Keep one."
        )
    return next(iter(weights.values()), None)
