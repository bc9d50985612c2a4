"""The page while its server wants a token, goes away and comes back."""

from __future__ import annotations

import signal
from pathlib import Path

from page_in_browser import NEEDS_CHROMIUM, browser, keep, send, wait_answer
from playwright.sync_api import Browser, expect
from running_server import Running, started

from medley.serving.limits import Limits
from medley.serving.page.mount import add_page

__all__ = ["browser"]  # the fixture
pytestmark = NEEDS_CHROMIUM


def test_a_token_is_the_password_of_a_login(browser: Browser) -> None:
    guarded = Running(
        Limits(), token="secret", change=lambda app, state: add_page(app, state) and None
    )
    try:
        page = browser.new_context().new_page()
        page.goto(guarded.address)
        for password, let_in in (("other", False), ("secret", True)):
            page.get_by_label("username").fill("me")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            if let_in:
                expect(page.locator("#box textarea")).to_be_visible(timeout=30_000)
            else:
                expect(page.get_by_text("Incorrect")).to_be_visible()
        page.context.close()
    finally:
        guarded.stop()


def test_a_server_that_vanishes_and_comes_back(browser: Browser, tmp_path: Path) -> None:
    process, address = started(tmp_path / "log", 0, "--page")
    try:
        page = browser.new_context().new_page()
        page.goto(address)
        expect(page.locator("#box textarea")).to_be_visible(timeout=60_000)
        send(page, "Which organ is shown?")
        wait_answer(page)
        page.fill("#box textarea", "half of a question")
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        gone = page.locator("#gone")
        expect(gone).to_contain_text("The server does not answer", timeout=30_000)
        expect(page.locator("#box textarea")).to_have_value("half of a question")
        keep(page, "vanished")
        process, _ = started(tmp_path / "log2", int(address.rsplit(":", 1)[1]), "--page")
        page.wait_for_timeout(6000)  # the library reloads the page by itself, or does not
        page.goto(address)
        expect(page.locator("#box textarea")).to_be_visible(timeout=60_000)
        expect(gone).to_be_hidden()
        send(page, "Which organ is shown?")
        wait_answer(page)
        page.context.close()
    finally:
        process.kill()
        process.wait(timeout=30)
