"""A browser for the tests of the web UI, and the actions of a user.

MEDLEY_SCREENSHOTS is a folder for screenshots (those of docs/serving.md among them).
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from running_server import RunningServer

from medley.phantoms import Finding, Phantom
from medley.serving.limits import Limits
from medley.serving.ui.mount import mount_ui

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NEEDS_CHROMIUM = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and "CI" not in os.environ, reason="Chromium is not installed"
    ),
]

SCAN = Phantom("CT", "head", (Finding("cyst", "large", "left", "upper"),), 5)
IMAGE_PROMPT = "Show me a CT scan of the head with a large marked cyst in the upper left."
LEFT, RIGHT = "#chat-left", "#chat-right"
MESSAGE = "#message textarea"
expect.set_options(timeout=30_000)  # Server, model and browser may share two slow cores.


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def feedback_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("feedback")


@pytest.fixture(scope="module")
def running(feedback_dir: Path) -> Iterator[RunningServer]:
    server = RunningServer(
        Limits(request_timeout=60, max_pixels=1_000_000),
        names=("tiny", "second"),
        configure=lambda app, state: mount_ui(app, state, feedback_dir),
    )
    yield server
    assert server.becomes_idle()
    server.stop()


OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, running: RunningServer) -> Iterator[OpenPage]:
    """Opens the web UI. Fails if a page requested another host, or if a script failed."""
    contexts, remote_urls, errors = [], [], []

    def check_request(request: Any) -> None:
        local = re.match(r"(data|blob):|https?://(127\.0\.0\.1|localhost)[:/]", request.url)
        if local is None:
            remote_urls.append(request.url)

    def new_page(url: str = running.url, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", check_request)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        expect(page.locator(MESSAGE)).to_be_visible(timeout=60_000)
        return page

    yield new_page
    for context in contexts:
        context.close()
    assert remote_urls == []
    assert errors == []


def scan_file(folder: Path, scan: Phantom = SCAN) -> Path:
    path = folder / "scan.png"
    scan.image(256).save(path)
    return path


def send(page: Page, text: str, *files: Path) -> None:
    if files:
        page.set_input_files("#message input[type=file]", [str(file) for file in files])
        thumbnails = page.locator("#message .thumbnail-item, #message .thumbnail-image")
        expect(thumbnails).not_to_have_count(0)
    page.fill(MESSAGE, text)
    note = page.locator("#note-left .status")
    before = note.inner_text()
    page.press(MESSAGE, "Enter")
    if before:  # The note of the previous response must not be mistaken for the new one.
        expect(note).not_to_have_text(before, timeout=60_000)


def wait_for_response(page: Page, side: str = "left") -> str:
    """Waits for a complete, failed or stopped response. Returns the note below it."""
    note = page.locator(f"#note-{side} .status")
    expect(note).to_have_text(re.compile(r"tokens in|Error:|stopped"), timeout=60_000)
    return note.inner_text()


def screenshot(page: Page, name: str, **options: Any) -> None:
    folder = os.environ.get("MEDLEY_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"ui-{name}.png"), **options)


@contextmanager
def slow_model(running: RunningServer, seconds: float) -> Iterator[None]:
    """Delays each token of the first model."""
    step = running.model.engine.step
    running.model.engine.step = lambda: (time.sleep(seconds), step())[1]  # type: ignore[method-assign]
    try:
        yield
    finally:
        running.model.engine.step = step  # type: ignore[method-assign]


def change_setting(page: Page, label: str, value: str) -> None:
    if not page.get_by_label("Seed").first.is_visible():
        page.get_by_label("Toggle Sidebar").click()
    field = page.get_by_label(label).first
    field.fill(value)
    field.press("Tab")


def set_image_count(page: Page, count: int) -> None:
    change_setting(page, "number input for Minimum images", str(count))
    change_setting(page, "number input for Maximum images", str(count))


def start_long_response(page: Page) -> None:
    """Requests eight images, and waits for the first preview."""
    page.get_by_label("Toggle Sidebar").click()
    page.get_by_label("image", exact=True).check()
    set_image_count(page, 8)
    send(page, IMAGE_PROMPT)
    expect(page.locator(f"{LEFT} .bot img").first).to_be_visible(timeout=60_000)


def use_best_settings(page: Page) -> None:
    """The settings with the best images of the embedded model (docs/log.md)."""
    change_setting(page, "number input for Text guidance scale", "2")
    change_setting(page, "number input for Image temperature", "0.4")


def page_with_conversation(browser: Browser, url: str) -> Page:
    """The web UI of a server, with a question and a response."""
    page = browser.new_context().new_page()
    page.goto(url)
    expect(page.locator(MESSAGE)).to_be_visible(timeout=60_000)
    send(page, "Which organ is shown?")
    wait_for_response(page)
    return page
