"""A browser for the tests of the page, and what a reader does in it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NEEDS_CHROMIUM = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no Chromium on this machine"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


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
