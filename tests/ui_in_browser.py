"""A browser for the tests of the page, and what a reader does in it."""

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
from running_server import Running

from medley.phantoms import Phantom
from medley.phantoms.scenes import Finding
from medley.serving.limits import Limits
from medley.serving.ui.mount import add_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NEEDS_CHROMIUM = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no Chromium on this machine"
)


SCAN = Phantom("CT", "head", (Finding("cyst", "large", "left", "upper"),), 5)
DRAW = "Show me a CT scan of the head with a large marked cyst in the upper left."
LEFT, RIGHT = "#chat-left", "#chat-right"
expect.set_options(timeout=30_000)  # two slow cores carry the server, the model and the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("votes")


@pytest.fixture(scope="module")
def running(votes: Path) -> Iterator[Running]:
    found = Running(
        Limits(seconds=60, pixels=1_000_000), names=("tiny", "second"),
        change=lambda app, state: add_page(app, state, votes) and None,
    )  # fmt: skip
    yield found
    assert found.idle()
    found.stop()


Opened = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, running: Running) -> Iterator[Opened]:
    """Opens the page; at the end nothing has been asked of another host, and no script failed."""
    contexts, elsewhere, faults = [], [], []

    def watch(page: Page) -> None:
        def request(made: Any) -> None:
            local = re.match(r"(data|blob):|https?://(127\.0\.0\.1|localhost)[:/]", made.url)
            if local is None:
                elsewhere.append(made.url)

        page.on("request", request)
        page.on("pageerror", lambda error: faults.append(str(error)))

    def open_page(address: str = running.address, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        watch(page)
        page.goto(address)
        expect(page.locator("#box textarea")).to_be_visible(timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert elsewhere == []
    assert faults == []


def picture(folder: Path, scan: Phantom = SCAN) -> Path:
    path = folder / "scan.png"
    scan.image(256).save(path)
    return path


def send(page: Page, text: str, *files: Path) -> None:
    if files:
        page.set_input_files("#box input[type=file]", [str(file) for file in files])
        expect(page.locator("#box .thumbnail-item, #box .thumbnail-image")).not_to_have_count(0)
    page.fill("#box textarea", text)
    line = page.locator("#line-left .status")
    before = line.inner_text()
    page.press("#box textarea", "Enter")
    if before:  # of the answer before, which must not be taken for the new one's
        expect(line).not_to_have_text(before, timeout=60_000)


def wait_answer(page: Page, side: str = "left") -> str:
    """The line below the talk, once the answer is whole."""
    line = page.locator(f"#line-{side} .status")
    expect(line).to_have_text(re.compile(r"tokens in|Not answered|stopped"), timeout=60_000)
    return line.inner_text()


def keep(page: Page, name: str, **options: Any) -> None:
    folder = os.environ.get("MEDLEY_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"page-{name}.png"), **options)


@contextmanager
def slowly(running: Running, seconds: float) -> Iterator[None]:
    """The first model takes so long for each token."""
    step = running.model.engine.step
    running.model.engine.step = lambda: (time.sleep(seconds), step())[1]  # type: ignore[method-assign]
    try:
        yield
    finally:
        running.model.engine.step = step  # type: ignore[method-assign]


def setting(page: Page, label: str, value: str) -> None:
    if not page.get_by_label("Seed").first.is_visible():
        page.get_by_label("Toggle Sidebar").click()
    field = page.get_by_label(label).first
    field.fill(value)
    field.press("Tab")


def long_drawing(page: Page) -> None:
    """Asked for, and its first picture is growing."""
    page.get_by_label("Toggle Sidebar").click()
    page.get_by_label("image", exact=True).check()
    setting(page, "number input for Pictures, at least", "8")
    setting(page, "number input for Pictures, at most", "8")
    send(page, DRAW)
    expect(page.locator(f"{LEFT} .bot img").first).to_be_visible(timeout=60_000)


def careful(page: Page) -> None:
    """The settings with which the embedded model draws best (docs/log.md)."""
    setting(page, "number input for Guidance by words", "2")
    setting(page, "number input for Temperature of pictures", "0.4")


def asked_once(browser: Browser, address: str) -> Page:
    """The page of a server, with a talk of one question."""
    page = browser.new_context().new_page()
    page.goto(address)
    expect(page.locator("#box textarea")).to_be_visible(timeout=60_000)
    send(page, "Which organ is shown?")
    wait_answer(page)
    return page
