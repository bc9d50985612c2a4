"""The web UI with a token, connection failures, a full queue, and a server that restarts."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect
from running_server import RunningServer, start_server
from ui_in_browser import (
    MESSAGE,
    NEEDS_CHROMIUM,
    browser,
    page_with_conversation,
    screenshot,
    send,
    slow_model,
    start_long_response,
    wait_for_response,
)

from medley.serving.limits import Limits
from medley.serving.ui.mount import mount_ui

__all__ = ["browser"]  # fixture
pytestmark = NEEDS_CHROMIUM


@contextmanager
def server_with_ui(**options: Any) -> Iterator[RunningServer]:
    running = RunningServer(Limits(), configure=mount_ui, **options)
    try:
        yield running
    finally:
        running.stop()


def test_login_requires_the_token(browser: Browser) -> None:
    with server_with_ui(token="secret") as running:
        page = browser.new_context().new_page()
        page.goto(running.url)
        for password in ("other", "secret"):
            page.get_by_label("username").fill("me")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            if password == "other":
                expect(page.get_by_text("Incorrect")).to_be_visible()
            else:
                expect(page.locator(MESSAGE)).to_be_visible(timeout=30_000)
        page.context.close()


def test_conversation_survives_connection_failures(browser: Browser) -> None:
    with server_with_ui() as running:
        page = page_with_conversation(browser, running.url)
        alert = page.locator("#alert")
        page.context.set_offline(True)
        expect(alert).to_contain_text("does not respond", timeout=30_000)
        page.fill(MESSAGE, "What modality is this?")
        page.press(MESSAGE, "Enter")
        page.wait_for_timeout(4000)
        page.context.set_offline(False)
        expect(page.locator("#chat-left .bot")).to_have_count(2, timeout=30_000)
        expect(alert).to_be_hidden()
        assert "tokens in" in wait_for_response(page)
        # During a response: the partial response stays, and the user decides when to reload.
        with slow_model(running, 0.05):
            start_long_response(page)
            running.abort_connections()
            expect(alert).to_contain_text("The connection was lost")
        page.wait_for_timeout(5000)  # Gradio alone would have reloaded the page by now.
        expect(page.locator("#chat-left .user")).to_have_count(3)
        assert running.becomes_idle()
        page.get_by_role("button", name="Reload the page").click()
        expect(page.locator("#chat-left .user")).to_have_count(0)
        expect(alert).to_be_hidden()
        page.context.close()


# Delays the end of the server's message stream, like a slow connection.
DELAY_STREAM_END = """(() => {
  const originalFetch = window.fetch.bind(window);
  window.fetch = async (...parameters) => {
    const response = await originalFetch(...parameters);
    if (!String(parameters[0]?.url ?? parameters[0]).includes("/queue/data")) return response;
    const delayed = new TransformStream({ transform: async (part, out) => {
      const isLast = new TextDecoder().decode(part).includes("close_stream");
      if (isLast) await new Promise((resolve) => setTimeout(resolve, 4000));
      out.enqueue(part);
    } });
    return new Response(response.body.pipeThrough(delayed), { headers: response.headers });
  };
})()"""


def test_message_sent_while_the_stream_ends_gets_a_response(browser: Browser) -> None:
    with server_with_ui() as running:
        page = browser.new_context().new_page()
        page.add_init_script(DELAY_STREAM_END)
        page.goto(running.url)
        expect(page.locator(MESSAGE)).to_be_visible(timeout=60_000)
        for count in (1, 2):  # after the events of loading the page, and after a response
            send(page, "Which organ is shown?")
            wait_for_response(page)
            expect(page.locator("#chat-left .bot")).to_have_count(count)
        page.context.close()


def test_queued_message_shows_its_position_and_is_cancelled_with_the_tab(
    browser: Browser,
) -> None:
    with server_with_ui(max_num_seqs=1) as running:
        first, second = (browser.new_context().new_page() for _ in range(2))
        for page in (first, second):
            page.goto(running.url)
            expect(page.locator(MESSAGE)).to_be_visible(timeout=60_000)
        with slow_model(running, 0.1):
            start_long_response(first)
            send(second, "Which organ is shown?")
            note = second.locator("#note-left .status")
            expect(note).to_have_text("queued, 0 requests ahead")
            assert (running.worker.running, running.worker.waiting) == (1, 1)
            screenshot(second, "queued")
            second.context.close()
            deadline = time.monotonic() + 30
            while running.worker.waiting and time.monotonic() < deadline:
                time.sleep(0.05)
            assert (running.worker.running, running.worker.waiting) == (1, 0)
            first.context.close()
            assert running.becomes_idle()


def test_open_tab_does_not_delay_shutdown(browser: Browser, tmp_path: Path) -> None:
    process, url = start_server(tmp_path / "log", 0, "--ui")
    try:
        page = page_with_conversation(browser, url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        log = (tmp_path / "log").read_text()
        assert "graceful shutdown exceeded" not in log
        assert "Traceback" not in log
        page.context.close()
    finally:
        process.kill()
        process.wait(timeout=30)


def test_conversation_stays_visible_when_the_server_restarts(
    browser: Browser, tmp_path: Path
) -> None:
    process, url = start_server(tmp_path / "log", 0, "--ui")
    try:
        page = page_with_conversation(browser, url)
        page.fill(MESSAGE, "half of a question")
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        alert = page.locator("#alert")
        expect(alert).to_contain_text("The server does not respond", timeout=30_000)
        expect(page.locator(MESSAGE)).to_have_value("half of a question")
        screenshot(page, "unreachable")
        process, _ = start_server(tmp_path / "log2", int(url.rsplit(":", 1)[1]), "--ui")
        expect(alert).to_contain_text("was restarted", timeout=30_000)
        expect(page.locator("#chat-left .bot")).to_have_count(1)
        expect(page.locator(MESSAGE)).to_have_value("half of a question")
        page.get_by_role("button", name="Reload the page").click()
        expect(page.locator("#chat-left .bot")).to_have_count(0, timeout=30_000)
        expect(page.locator(MESSAGE)).to_be_visible(timeout=60_000)
        expect(alert).to_be_hidden()
        send(page, "Which organ is shown?")
        wait_for_response(page)
        page.context.close()
    finally:
        process.kill()
        process.wait(timeout=30)
