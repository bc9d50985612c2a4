"""The page while its server wants a token, goes away and comes back."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from page_in_browser import (
    NEEDS_CHROMIUM,
    asked_once,
    browser,
    keep,
    long_drawing,
    send,
    slowly,
    wait_answer,
)
from playwright.sync_api import Browser, expect
from running_server import Running, started

from medley.serving.limits import Limits
from medley.serving.ui.mount import add_page

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


def test_a_connection_that_is_away_for_a_moment_loses_no_talk(
    browser: Browser, tmp_path: Path
) -> None:
    running = Running(Limits(), change=lambda app, state: add_page(app, state) and None)
    try:
        page = asked_once(browser, running.address)
        page.context.set_offline(True)
        expect(page.locator("#gone")).to_contain_text("does not answer", timeout=30_000)
        page.fill("#box textarea", "What modality is this?")
        page.press("#box textarea", "Enter")
        page.wait_for_timeout(4000)
        page.context.set_offline(False)
        expect(page.locator("#chat-left .bot")).to_have_count(2, timeout=30_000)
        expect(page.locator("#gone")).to_be_hidden()
        assert "tokens in" in wait_answer(page)
        # In the middle of an answer: what there is stays, and the reader decides when to reload.
        with slowly(running, 0.05):
            long_drawing(page)
            running.cut()
            expect(page.locator("#gone")).to_contain_text("The connection was lost")
        page.wait_for_timeout(5000)  # the library would have reloaded the page by now
        expect(page.locator("#chat-left .user")).to_have_count(3)
        assert running.idle()
        page.get_by_role("button", name="Reload the page").click()
        expect(page.locator("#chat-left .user")).to_have_count(0)
        expect(page.locator("#gone")).to_be_hidden()
        page.context.close()
    finally:
        running.stop()


# The end of the server's news is read late, as on a slow connection.
LATE_END = """(() => {
  const own = window.fetch.bind(window);
  window.fetch = async (...asked) => {
    const answer = await own(...asked);
    if (!String(asked[0]?.url ?? asked[0]).includes("/queue/data")) return answer;
    const late = new TransformStream({ transform: async (part, out) => {
      const last = new TextDecoder().decode(part).includes("close_stream");
      if (last) await new Promise((resolve) => setTimeout(resolve, 4000));
      out.enqueue(part);
    } });
    return new Response(answer.body.pipeThrough(late), { headers: answer.headers });
  };
})()"""


def test_what_is_sent_as_the_servers_news_end_is_answered(browser: Browser) -> None:
    running = Running(Limits(), change=lambda app, state: add_page(app, state) and None)
    try:
        page = browser.new_context().new_page()
        page.add_init_script(LATE_END)
        page.goto(running.address)
        expect(page.locator("#box textarea")).to_be_visible(timeout=60_000)
        for answers in (1, 2):  # behind the events of the page's start, and behind an answer
            send(page, "Which organ is shown?")
            wait_answer(page)
            expect(page.locator("#chat-left .bot")).to_have_count(answers)
        page.context.close()
    finally:
        running.stop()


def test_who_waits_is_told_so_and_leaves_the_queue_by_closing_the_tab(browser: Browser) -> None:
    running = Running(Limits(), rows=1, change=lambda app, state: add_page(app, state) and None)
    try:
        first, second = (browser.new_context().new_page() for _ in range(2))
        for page in (first, second):
            page.goto(running.address)
            expect(page.locator("#box textarea")).to_be_visible(timeout=60_000)
        with slowly(running, 0.1):
            long_drawing(first)
            send(second, "Which organ is shown?")
            line = second.locator("#line-left .status")
            expect(line).to_have_text("waiting, 0 before you")
            assert (running.worker.running, running.worker.waiting) == (1, 1)
            keep(second, "waiting")
            second.context.close()
            until = time.monotonic() + 30
            while running.worker.waiting and time.monotonic() < until:
                time.sleep(0.05)
            assert (running.worker.running, running.worker.waiting) == (1, 0)
            first.context.close()
            assert running.idle()
    finally:
        running.stop()


def test_an_open_tab_does_not_hold_up_a_server_that_closes(
    browser: Browser, tmp_path: Path
) -> None:
    process, address = started(tmp_path / "log", 0, "--page")
    try:
        page = asked_once(browser, address)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        log = (tmp_path / "log").read_text()
        assert "graceful shutdown exceeded" not in log  # it would have waited for the tab
        assert "Traceback" not in log
        page.context.close()
    finally:
        process.kill()
        process.wait(timeout=30)


def test_a_server_that_vanishes_and_comes_back(browser: Browser, tmp_path: Path) -> None:
    process, address = started(tmp_path / "log", 0, "--page")
    try:
        page = asked_once(browser, address)
        page.fill("#box textarea", "half of a question")
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        gone = page.locator("#gone")
        expect(gone).to_contain_text("The server does not answer", timeout=30_000)
        expect(page.locator("#box textarea")).to_have_value("half of a question")
        keep(page, "vanished")
        process, _ = started(tmp_path / "log2", int(address.rsplit(":", 1)[1]), "--page")
        expect(gone).to_contain_text("started anew", timeout=30_000)
        expect(page.locator("#chat-left .bot")).to_have_count(1)  # the talk is still there
        expect(page.locator("#box textarea")).to_have_value("half of a question")
        page.get_by_role("button", name="Reload the page").click()
        expect(page.locator("#chat-left .bot")).to_have_count(0, timeout=30_000)
        expect(page.locator("#box textarea")).to_be_visible(timeout=60_000)
        expect(gone).to_be_hidden()
        send(page, "Which organ is shown?")
        wait_answer(page)
        page.context.close()
    finally:
        process.kill()
        process.wait(timeout=30)
