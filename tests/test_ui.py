"""The page's own rules, without a browser: messages, talks, what is kept of them."""

from __future__ import annotations

import json
import os
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medley.data.document import Document
from medley.errors import UserError
from medley.serving.limits import Limits, RequestError
from medley.serving.ui.conversation import ChatMessage, Conversation, messages_of, parts_of
from medley.serving.ui.examples import read_examples
from medley.serving.ui.export import as_html, as_json
from medley.serving.ui.feedback import FeedbackLog
from medley.serving.ui.generate import options_of
from medley.serving.ui.image_store import KEPT, ImageStore
from medley.serving.ui.layout import SETTINGS

SETTING = {
    "mode": "any", "seed": 3, "min_images": 0, "max_images": 0, "max_new_tokens": 9,
    "text_greedy": True, "text_temperature": 1.0, "text_top_p": 1.0, "text_top_k": 0,
    "repetition_penalty": 1.0, "guidance_scale_text": 3.0, "guidance_scale_image": 1.0,
    "image_greedy": False,
    "image_temperature": 1.0, "image_top_p": 1.0,
    "image_top_k": 0,
}  # fmt: skip


def files(folder: Path, *colours: str) -> list[str]:
    paths = []
    for number, colour in enumerate(colours):
        path = folder / f"{number}.png"
        Image.new("RGB", (8, 8), colour).save(path)
        paths.append(str(path))
    return paths


def colours(parts: Any) -> list[Any]:
    return [part if isinstance(part, str) else part.image.getpixel((0, 0)) for part in parts]


RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.mark.parametrize(
    ("text", "shown", "expected"),
    [
        ("Why?", [], ["Why?"]), (" Why? ", ["red"], [RED, "Why?"]), ("", ["red"], [RED]),
        ("a <image> b", ["red"], ["a ", RED, " b"]),
        ("a <image> b", ["red", "blue"], [RED, "a ", BLUE, " b"]),
        ("<image><image>", ["red", "blue"], [RED, BLUE]),
    ],
)  # fmt: skip
def test_pictures_stand_where_they_are_said_to(
    text: str, shown: list[str], expected: list[Any], tmp_path: Path
) -> None:
    gallery = ImageStore(tmp_path / "kept")
    assert colours(parts_of(text, files(tmp_path, *shown), Limits(), gallery)) == expected


def test_messages_that_cannot_be_are_refused(tmp_path: Path) -> None:
    two = files(tmp_path, "red", "blue")
    for text, shown, said in (
        ("", [], "empty"), ("  ", [], "empty"), ("<image>", [], "1 places for a picture"),
        ("x", two * 17, "34 pictures, the limit of a message is 32"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=said):
            parts_of(text, shown, Limits(), ImageStore(tmp_path / "kept"))


def test_a_talk_asks_what_was_answered_and_the_last_question() -> None:
    def turns(talk: Conversation) -> list[tuple[str, Any]]:
        document: Document = talk.document(lambda part, place: str(part))
        return [(turn.role, turn.parts[0]) for turn in document.turns]

    talk = Conversation().asked(["one"])
    assert turns(talk) == [("user", "one")]
    failed = talk.answer(ChatMessage("assistant", (), "Not answered", "m", "failed"))
    with pytest.raises(RequestError, match="nothing has been asked"):
        turns(failed)
    assert turns(failed.asked(["two"])) == [("user", "two")]
    assert turns(failed.again()) == [("user", "one")]
    assert (failed.again().tries, failed.again().again().tries) == (1, 1)
    answered = talk.answer(ChatMessage("assistant", ("yes",), "", "m"))
    again = answered.asked(["three"])
    assert turns(again) == [("user", "one"), ("assistant", "yes"), ("user", "three")]
    assert turns(again.asked(["four"]))[-2:] == [("assistant", "yes"), ("user", "four")]
    stopped = talk.answer(ChatMessage("assistant", ("ye",), "stopped", "m", "stopped"))
    assert turns(stopped.asked(["five"]))[1] == ("assistant", "ye")
    empty = talk.answer(ChatMessage("assistant", (), "stopped", "m", "stopped"))
    assert turns(empty.asked(["six"])) == [("user", "six")]


def test_settings_are_those_of_generation() -> None:
    assert list(SETTINGS) == list(SETTING)
    assert options_of(SETTING, 0).seed == 3
    assert options_of(SETTING, 2).seed == 5
    assert options_of(SETTING, 0).max_images is None
    seeds = {options_of(SETTING | {"seed": -1}, 0).seed for _ in range(8)}
    assert len(seeds) > 1
    for change, said in (
        ({"seed": None}, "seed is empty"), ({"text_top_p": None}, "text_top_p is empty"),
        ({"min_images": 3, "max_images": 2}, "max_images is 2"),
        ({"mode": "text", "min_images": 1}, "mode text draws no pictures"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            options_of(SETTING | change, 0)


def a_talk(folder: Path) -> Conversation:
    picture = ImageStore(folder / "gallery").drawn(Image.new("RGB", (8, 8), "red"))
    talk = Conversation().asked([picture, "<b>what</b> & why?"])
    said = ChatMessage("assistant", ("a picture: ", picture), "m, seed 1", "m", settings=SETTING)
    return talk.answer(said)


def test_messages_are_shown_and_each_picture_is_kept_once(tmp_path: Path) -> None:
    shown = messages_of(a_talk(tmp_path))
    assert messages_of(a_talk(tmp_path)) == shown
    assert [row["role"] for row in shown] == ["user", "assistant"]
    assert shown[0]["content"][1] == "<b>what</b> & why?"
    assert shown[0]["content"][0] == shown[1]["content"][1]
    assert len(list((tmp_path / "gallery").rglob("*.png"))) == 1


def test_a_picture_is_read_as_it_was_sent_and_shown_smaller(tmp_path: Path) -> None:
    sent = tmp_path / "scan.png"
    Image.new("L", (3000, 20), 77).save(sent)
    gallery = ImageStore(tmp_path / "gallery")
    kept = gallery.sent(str(sent), Limits())
    assert kept.read() == sent.read_bytes()
    assert kept.image.size == (1000, 7)
    with pytest.raises(RequestError, match=r"gone\.png: No such file"):
        gallery.sent(str(tmp_path / "gone.png"), Limits())


def test_pictures_go_a_day_after_they_were_last_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = ImageStore(tmp_path)
    old, used = (gallery.drawn(Image.new("RGB", (8, 8), colour)) for colour in ("red", "blue"))
    monkeypatch.setattr("medley.serving.ui.image_store.SWEEP", 0.0)
    for kept in (old, used):
        os.utime(kept.file, (time.time() - KEPT - 9,) * 2)
    used.read()
    gallery.drawn(Image.new("RGB", (8, 8), "green"))
    assert (old.file.exists(), used.file.exists()) == (False, True)
    with pytest.raises(RequestError, match="not kept any more"):
        old.read()


def test_a_talk_is_exported_whole_and_harmless(tmp_path: Path) -> None:
    talk = a_talk(tmp_path)
    failed = talk.asked(["again"]).answer(
        ChatMessage("assistant", (), "Not answered", "m", "failed")
    )
    row = json.loads(as_json([failed]))
    (told,) = row["talks"]
    assert [message["role"] for message in told["messages"]] == ["user", "assistant", "user"]
    assert told["messages"][0]["content"][1] == {"type": "text", "text": "<b>what</b> & why?"}
    assert told["messages"][1]["content"][1]["type"] == "image_url"
    assert told["answers"] == [
        {"message": 1, "model": "m", "settings": SETTING, "note": "m, seed 1"}
    ]
    tags = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: Any) -> None:
            tags.append(tag)

    worse = talk.answer(ChatMessage("assistant", ("<script>",), "<script>", "<script>"))
    page = as_html([talk, worse])
    Reader().feed(page)
    assert tags.count("img") == 3
    assert "b" not in tags
    assert "script" not in tags
    assert "http" not in page


def test_votes_are_lines_as_llava_keeps_them(tmp_path: Path) -> None:
    votes = FeedbackLog(tmp_path / "votes")
    file = votes.keep(a_talk(tmp_path), True)
    assert votes.keep(a_talk(tmp_path), False) == file
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["type"] for row in rows] == ["upvote", "downvote"]
    assert [row["model"] for row in rows] == ["m", "m"]
    assert rows[0]["state"]["settings"] == SETTING
    assert rows[0]["state"]["messages"][1] == ["assistant", "a picture: <image>"]
    assert len(set(rows[0]["state"]["images"])) == 1
    assert (votes.folder / rows[0]["state"]["images"][0]).is_file()


def test_own_examples_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    files(tmp_path, "red")
    path = tmp_path / "mine.jsonl"
    good = {"text": "<image>Why?<reserved08706>So.", "image_path": "0.png"}
    path.write_text(json.dumps(good) + "\n")
    (example,) = read_examples(path)
    assert (example.text, example.files) == ("<image>Why?", (str(tmp_path / "0.png"),))
    for bad, said in (
        ("{", "mine.jsonl:2: "), (json.dumps(good | {"image_path": "none.png"}), "is not there"),
        (json.dumps({"text": "<image>x", "image_tokens": [[1]]}), "by path"),
    ):  # fmt: skip
        path.write_text(json.dumps(good) + "\n" + bad + "\n")
        with pytest.raises(UserError, match=said):
            read_examples(path)
