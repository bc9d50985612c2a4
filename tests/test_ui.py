"""Logic of the web UI without a browser: messages, conversations, image files, export, feedback."""

from __future__ import annotations

import json
import os
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.serving.limits import Limits, RequestError
from medley.serving.ui.conversation import (
    ChatMessage,
    Conversation,
    chatbot_messages,
    parse_message,
)
from medley.serving.ui.examples import read_examples
from medley.serving.ui.export import to_html, to_json
from medley.serving.ui.feedback import FeedbackLog
from medley.serving.ui.generate import to_options
from medley.serving.ui.image_store import RETENTION_SECONDS, ImageStore
from medley.serving.ui.settings import SETTINGS

SETTING_VALUES = {
    "mode": "any", "seed": 3, "min_images": 0, "max_images": 0, "max_new_tokens": 9,
    "text_greedy": True, "text_temperature": 1.0, "text_top_p": 1.0, "text_top_k": 0,
    "repetition_penalty": 1.0, "guidance_scale_text": 3.0, "guidance_scale_image": 1.0,
    "image_greedy": False, "image_temperature": 1.0, "image_top_p": 1.0, "image_top_k": 0,
}  # fmt: skip
RED, BLUE = (255, 0, 0), (0, 0, 255)


def image_files(folder: Path, *colors: str) -> list[str]:
    paths = []
    for number, color in enumerate(colors):
        path = folder / f"{number}.png"
        Image.new("RGB", (8, 8), color).save(path)
        paths.append(str(path))
    return paths


def colors_of(parts: Any) -> list[Any]:
    return [p if isinstance(p, str) else p.display_image.getpixel((0, 0)) for p in parts]


@pytest.mark.parametrize(
    ("text", "colors", "expected"),
    [
        ("Why?", [], ["Why?"]), (" Why? ", ["red"], [RED, "Why?"]), ("", ["red"], [RED]),
        ("a <image> b", ["red"], ["a ", RED, " b"]),
        ("a <image> b", ["red", "blue"], [RED, "a ", BLUE, " b"]),
        ("<image><image>", ["red", "blue"], [RED, BLUE]),
    ],
)  # fmt: skip
def test_images_replace_placeholders_and_others_come_first(
    text: str, colors: list[str], expected: list[Any], tmp_path: Path
) -> None:
    store = ImageStore(tmp_path / "store")
    parts = parse_message(text, image_files(tmp_path, *colors), Limits(), store)
    assert colors_of(parts) == expected


def test_invalid_messages_are_rejected(tmp_path: Path) -> None:
    two = image_files(tmp_path, "red", "blue")
    for text, files, message in (
        ("", [], "empty"), ("  ", [], "empty"), ("<image>", [], "has 1 <image>, but 0 images"),
        ("x", two * 17, r"\(got 34, limit 32\)"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=message):
            parse_message(text, files, Limits(), ImageStore(tmp_path / "store"))


def test_prompt_has_messages_with_responses_and_the_last_question() -> None:
    def turns(conversation: Conversation) -> list[tuple[str, Any]]:
        document = conversation.to_document(lambda part, where: str(part))
        return [(turn.role, turn.parts[0]) for turn in document.turns]

    first = Conversation().with_user_message(["one"])
    assert turns(first) == [("user", "one")]
    failed = first.with_response(ChatMessage("assistant", (), "Error", "m", "failed"))
    with pytest.raises(RequestError, match="no question"):
        turns(failed)
    assert turns(failed.with_user_message(["two"])) == [("user", "two")]
    again = failed.without_response()
    assert turns(again) == [("user", "one")]
    assert (again.attempts, again.without_response().attempts) == (1, 1)
    complete = first.with_response(ChatMessage("assistant", ("yes",), "", "m"))
    second = complete.with_user_message(["three"])
    assert turns(second) == [("user", "one"), ("assistant", "yes"), ("user", "three")]
    assert turns(second.with_user_message(["four"]))[-2:] == [
        ("assistant", "yes"),
        ("user", "four"),
    ]
    stopped = first.with_response(ChatMessage("assistant", ("ye",), "stopped", "m", "stopped"))
    assert turns(stopped.with_user_message(["five"]))[1] == ("assistant", "ye")
    empty = first.with_response(ChatMessage("assistant", (), "stopped", "m", "stopped"))
    assert turns(empty.with_user_message(["six"])) == [("user", "six")]


def test_settings_are_generation_options() -> None:
    assert list(SETTINGS) == list(SETTING_VALUES)
    assert SETTINGS.keys() == GenerationOptions.__dataclass_fields__.keys() - {"stop"}
    assert to_options(SETTING_VALUES, 0).seed == 3
    assert to_options(SETTING_VALUES, 2).seed == 5
    assert to_options(SETTING_VALUES, 0).max_images is None
    seeds = {to_options(SETTING_VALUES | {"seed": -1}, 0).seed for _ in range(8)}
    assert len(seeds) > 1
    for change, message in (
        ({"seed": None}, "seed is empty"), ({"text_top_p": None}, "text_top_p is empty"),
        ({"min_images": 3, "max_images": 2}, "max_images is 2"),
        ({"mode": "text", "min_images": 1}, "mode text generates no images"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            to_options(SETTING_VALUES | change, 0)


def make_conversation(folder: Path) -> Conversation:
    image = ImageStore(folder / "store").add_generated(Image.new("RGB", (8, 8), "red"))
    conversation = Conversation().with_user_message([image, "<b>what</b> & why?"])
    return conversation.with_response(
        ChatMessage("assistant", ("an image: ", image), "m, seed 1", "m", settings=SETTING_VALUES)
    )


def test_equal_images_are_stored_once(tmp_path: Path) -> None:
    messages = chatbot_messages(make_conversation(tmp_path))
    assert chatbot_messages(make_conversation(tmp_path)) == messages
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"][1] == "<b>what</b> & why?"
    assert messages[0]["content"][0] == messages[1]["content"][1]
    assert len(list((tmp_path / "store").rglob("*.png"))) == 1


def test_uploads_keep_their_bytes_and_are_displayed_smaller(tmp_path: Path) -> None:
    upload = tmp_path / "scan.png"
    Image.new("L", (3000, 20), 77).save(upload)
    store = ImageStore(tmp_path / "store")
    image = store.add_upload(str(upload), Limits())
    assert image.read_bytes() == upload.read_bytes()
    assert image.display_image.size == (1000, 7)
    with pytest.raises(RequestError, match=r"missing\.png: No such file"):
        store.add_upload(str(tmp_path / "missing.png"), Limits())


def test_images_are_deleted_a_day_after_their_last_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ImageStore(tmp_path)
    unused, used = (store.add_generated(Image.new("RGB", (8, 8), c)) for c in ("red", "blue"))
    monkeypatch.setattr("medley.serving.ui.image_store.CLEANUP_SECONDS", 0.0)
    for image in (unused, used):
        os.utime(image.path, (time.time() - RETENTION_SECONDS - 9,) * 2)
    used.read_bytes()
    store.add_generated(Image.new("RGB", (8, 8), "green"))
    assert (unused.path.exists(), used.path.exists()) == (False, True)
    with pytest.raises(RequestError, match="This image was deleted"):
        unused.read_bytes()


def test_export_is_complete_and_escaped(tmp_path: Path) -> None:
    conversation = make_conversation(tmp_path)
    failed = conversation.with_user_message(["again"]).with_response(
        ChatMessage("assistant", (), "Error", "m", "failed")
    )
    exported = json.loads(to_json([failed]))
    assert "Not for clinical decisions" in exported["use"]
    (content,) = exported["conversations"]
    assert [message["role"] for message in content["messages"]] == ["user", "assistant", "user"]
    assert content["messages"][0]["content"][1] == {"type": "text", "text": "<b>what</b> & why?"}
    assert content["messages"][1]["content"][1]["type"] == "image_url"
    assert content["responses"] == [
        {"message": 1, "model": "m", "settings": SETTING_VALUES, "note": "m, seed 1"}
    ]
    tags = []

    class TagCollector(HTMLParser):
        def handle_starttag(self, tag: str, attributes: Any) -> None:
            tags.append(tag)

    markup = ChatMessage("assistant", ("<script>",), "<script>", "<script>")
    page = to_html([conversation, conversation.with_response(markup)])
    TagCollector().feed(page)
    assert tags.count("img") == 3
    assert "b" not in tags
    assert "script" not in tags
    assert "http" not in page
    assert "not for clinical decisions" in page


def test_export_replaces_deleted_images_with_text(tmp_path: Path) -> None:
    conversation = make_conversation(tmp_path)
    for image in conversation.images:
        image.path.unlink(missing_ok=True)
    for text in (to_json([conversation]), to_html([conversation])):
        assert text.count("[image deleted]") == 2


def test_feedback_has_the_format_of_llava(tmp_path: Path) -> None:
    log = FeedbackLog(tmp_path / "feedback")
    file = log.append(make_conversation(tmp_path), True)
    assert log.append(make_conversation(tmp_path), False) == file
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["type"] for row in rows] == ["upvote", "downvote"]
    assert [row["model"] for row in rows] == ["m", "m"]
    assert rows[0]["state"]["settings"] == SETTING_VALUES
    assert rows[0]["state"]["messages"][1] == ["assistant", "an image: <image>"]
    assert len(set(rows[0]["state"]["images"])) == 1
    assert (log.folder / rows[0]["state"]["images"][0]).is_file()


def test_examples_are_read_and_invalid_ones_are_named(tmp_path: Path) -> None:
    image_files(tmp_path, "red")
    path = tmp_path / "examples.jsonl"
    valid = {"text": "<image>Why?<reserved08706>So.", "image_path": "0.png"}
    path.write_text(json.dumps(valid) + "\n")
    (example,) = read_examples(path)
    assert (example.text, example.files) == ("<image>Why?", (str(tmp_path / "0.png"),))
    for invalid, message in (
        ("{", "examples.jsonl:2: "),
        (json.dumps(valid | {"image_path": "none.png"}), "none.png not found"),
        (json.dumps({"text": "<image>x", "image_tokens": [[1]]}), "by path"),
    ):
        path.write_text(json.dumps(valid) + "\n" + invalid + "\n")
        with pytest.raises(UserError, match=message):
            read_examples(path)
