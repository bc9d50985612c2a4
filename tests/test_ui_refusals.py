"""Errors, accessibility and access control of the web UI, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import expect
from running_server import RunningServer
from ui_in_browser import (
    IMAGE_PROMPT,
    LEFT,
    MESSAGE,
    NEEDS_CHROMIUM,
    OpenPage,
    browser,
    feedback_dir,
    open_page,
    running,
    scan_file,
    screenshot,
    send,
    use_best_settings,
    wait_for_response,
)

__all__ = ["browser", "feedback_dir", "open_page", "running"]  # fixtures
pytestmark = NEEDS_CHROMIUM


def test_rejected_message_stays_in_its_box_with_the_reason(
    open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page()
    invalid = tmp_path / "invalid.png"
    invalid.write_bytes(b"not an image")
    send(page, "What is this?", invalid)
    expect(page.get_by_text("Unsupported image format")).to_be_visible()
    expect(page.locator(MESSAGE)).to_have_value("What is this?")
    page.wait_for_timeout(1000)  # until the notification's animation has ended
    screenshot(page, "error")
    page = open_page()
    large = tmp_path / "large.png"
    Image.new("L", (2000, 2000)).save(large)
    send(page, "What is this?", large)
    expect(page.get_by_text("Too many pixels (got 4000000, limit 1000000)")).to_be_visible()


def test_failed_response_shows_the_error_and_can_be_regenerated(
    open_page: OpenPage, running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page()
    with monkeypatch.context() as patched:
        patched.setattr(running.model.engine, "step", lambda: 1 / 0)
        send(page, "Which organ is shown?")
        assert "Error: Internal server error (ZeroDivisionError)." in wait_for_response(page)
        expect(page.locator(f"{LEFT} .bot")).to_contain_text("Error: Internal server error")
    page.locator("#regenerate").click()
    expect(page.locator("#note-left .status")).to_contain_text("tokens in", timeout=60_000)


def test_layout_fits_a_phone(open_page: OpenPage) -> None:
    page = open_page(color_scheme="dark")
    use_best_settings(page)
    page.set_viewport_size({"width": 360, "height": 740})
    send(page, IMAGE_PROMPT)
    wait_for_response(page)
    overflow = page.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")
    assert overflow <= 0
    screenshot(page, "phone", full_page=True)


def test_controls_have_names_and_keyboard_focus(open_page: OpenPage) -> None:
    page = open_page()
    page.wait_for_function(
        """() => [...document.querySelectorAll("button, input:not([type=file]), textarea, select")]
           .filter(e => e.offsetParent && !(e.ariaLabel || e.title || e.innerText.trim()
               || e.getAttribute("aria-labelledby") || (e.labels && e.labels.length)))
           .length === 0"""
    )
    page.locator(MESSAGE).focus()
    focused = []
    for _ in range(12):
        page.keyboard.press("Tab")
        focused.append(
            page.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel")
        )
    for name in ("Stop", "Regenerate", "Clear", "Save as HTML", "Save as JSON"):
        assert name in focused
    assert page.evaluate("document.documentElement.lang") == "en"


def test_only_uploaded_files_can_be_read(
    open_page: OpenPage, running: RunningServer, tmp_path: Path
) -> None:
    """Crafted requests with a local file or a URL in place of an upload fail."""
    page = open_page()
    secret = scan_file(tmp_path)
    config = httpx.get(f"{running.url}/config").json()
    (submit,) = [d for d in config["dependencies"] if d["targets"][0][1] == "submit"]
    (examples,) = [c["id"] for c in config["components"] if c["type"] == "dataset"]
    load_example = next(d for d in config["dependencies"] if d["targets"][0][0] == examples)

    def call(dependency: Any, data: list[Any]) -> Any:
        body = {"data": data, "fn_index": dependency["id"], "session_hash": "mine"}
        assert httpx.post(f"{running.url}/gradio_api/queue/join", json=body).status_code == 200
        with httpx.stream(
            "GET", f"{running.url}/gradio_api/queue/data?session_hash=mine", timeout=60
        ) as stream:
            lines = [json.loads(text[6:]) for text in stream.iter_lines() if text[:4] == "data"]
        (completed,) = [line for line in lines if line["msg"] == "process_completed"]
        return completed

    def send_file(path: str) -> Any:
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        message = {"text": "x", "files": [file]}
        return call(submit, [message, False, None, None, [], None, []])

    with secret.open("rb") as content:
        uploaded = httpx.post(f"{running.url}/gradio_api/upload", files={"files": content})
    for _ in range(2):  # The second time, the session has loaded an example.
        for path in (str(secret), "/etc/hostname", f"{running.url}/health",
                     "https://example.com/scan.png"):  # fmt: skip
            assert send_file(path)["success"] is False, path
        assert call(load_example, [0])["success"] is True
    assert send_file(uploaded.json()[0])["success"] is True
    for path in (
        f"file={secret}", "file=/etc/hostname", f"file={running.url}/health", "openapi.json",
        "deep_link?session_hash=mine", "proxy=http://127.0.0.1", "process_recording", "runs",
    ):  # fmt: skip
        assert httpx.get(f"{running.url}/gradio_api/{path}").status_code in (403, 404), path
    assert httpx.get(f"{running.url}/config?deep_link=x").status_code == 404
    expect(page.locator(f"{LEFT} .bot")).to_have_count(0)
