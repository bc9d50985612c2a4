"""What goes wrong on the page, who can use it, and what it refuses, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from page_in_browser import (
    DRAW,
    LEFT,
    NEEDS_CHROMIUM,
    Opened,
    browser,
    careful,
    keep,
    opened,
    picture,
    running,
    send,
    votes,
    wait_answer,
)
from PIL import Image
from playwright.sync_api import expect
from running_server import Running

__all__ = ["browser", "opened", "running", "votes"]  # the fixtures
pytestmark = NEEDS_CHROMIUM


def test_what_cannot_be_sent_stays_in_the_box_with_the_reason(
    opened: Opened, tmp_path: Path
) -> None:
    page = opened()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture at all")
    send(page, "What is this?", broken)
    expect(page.get_by_text("not a picture in a format that is known")).to_be_visible()
    expect(page.locator("#box textarea")).to_have_value("What is this?")
    page.wait_for_timeout(1000)  # until it has moved to its place
    keep(page, "error")
    page = opened()
    large = tmp_path / "large.png"
    Image.new("L", (2000, 2000)).save(large)
    send(page, "What is this?", large)
    expect(page.get_by_text("4000000 pixels, the limit is 1000000")).to_be_visible()


def test_an_answer_that_fails_says_why_and_can_be_asked_again(
    opened: Opened, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = opened()
    with monkeypatch.context() as patched:
        patched.setattr(running.model.engine, "step", lambda: 1 / 0)
        send(page, "Which organ is shown?")
        assert "Not answered: ZeroDivisionError inside of the server" in wait_answer(page)
        expect(page.locator(f"{LEFT} .bot")).to_contain_text("Not answered")
    page.locator("#again").click()
    expect(page.locator("#line-left .status")).to_contain_text("tokens in", timeout=60_000)


def test_a_phone_shows_all_of_it(opened: Opened) -> None:
    page = opened(color_scheme="dark")
    careful(page)
    page.set_viewport_size({"width": 360, "height": 740})
    send(page, DRAW)
    wait_answer(page)
    wide = page.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")
    assert wide <= 0
    keep(page, "phone", full_page=True)


def test_everything_has_a_name_and_the_keyboard_reaches_it(opened: Opened) -> None:
    page = opened()
    page.wait_for_function(
        """() => [...document.querySelectorAll("button, input:not([type=file]), textarea, select")]
           .filter(e => e.offsetParent && !(e.ariaLabel || e.title || e.innerText.trim()
               || e.getAttribute("aria-labelledby") || (e.labels && e.labels.length)))
           .length === 0"""
    )
    page.locator("#box textarea").focus()
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel")
        )
    for name in ("Stop", "Regenerate", "Clear", "Save as HTML", "Save as JSON"):
        assert name in reached
    assert page.evaluate("document.documentElement.lang") == "en"


def test_nothing_but_what_was_sent_is_read_or_fetched(
    opened: Opened, running: Running, tmp_path: Path
) -> None:
    """Requests made by hand: a file of this machine, and an address, in the place of a picture."""
    page = opened()
    secret = picture(tmp_path)
    config = httpx.get(f"{running.address}/config").json()
    (take,) = [d for d in config["dependencies"] if d["targets"][0][1] == "submit"]
    (offered,) = [c["id"] for c in config["components"] if c["type"] == "dataset"]
    load = next(d for d in config["dependencies"] if d["targets"][0][0] == offered)

    def done(dependency: Any, data: list[Any]) -> Any:
        body = {"data": data, "fn_index": dependency["id"], "session_hash": "mine"}
        assert httpx.post(f"{running.address}/gradio_api/queue/join", json=body).status_code == 200
        with httpx.stream(
            "GET", f"{running.address}/gradio_api/queue/data?session_hash=mine", timeout=60
        ) as told:
            lines = [json.loads(line[6:]) for line in told.iter_lines() if line.startswith("data")]
        (ended,) = [line for line in lines if line["msg"] == "process_completed"]
        return ended

    def taken(path: str) -> Any:
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        message = {"text": "x", "files": [file]}
        return done(take, [message, False, None, None, [], None, []])

    with secret.open("rb") as content:
        sent = httpx.post(f"{running.address}/gradio_api/upload", files={"files": content})
    for _ in range(2):  # the second time, of a session in which an example was chosen
        for path in (str(secret), "/etc/hostname", f"{running.address}/health",
                     "https://example.com/scan.png"):  # fmt: skip
            assert taken(path)["success"] is False, path
        assert done(load, [0])["success"] is True
    assert taken(sent.json()[0])["success"] is True  # so it was the files that were refused
    for path in (
        f"file={secret}", "file=/etc/hostname", f"file={running.address}/health", "openapi.json",
        "deep_link?session_hash=mine", "proxy=http://127.0.0.1", "process_recording", "runs",
    ):  # fmt: skip
        assert httpx.get(f"{running.address}/gradio_api/{path}").status_code in (403, 404), path
    assert httpx.get(f"{running.address}/config?deep_link=x").status_code == 404
    expect(page.locator(f"{LEFT} .bot")).to_have_count(0)
