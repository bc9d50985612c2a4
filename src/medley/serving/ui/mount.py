"""The page in the server's own process, at `/`."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from gradio import processing_utils
from gradio.routes import App
from starlette.routing import Mount

from medley.serving.state import State
from medley.serving.ui.examples import Example
from medley.serving.ui.image_store import private_folder
from medley.serving.ui.layout import Page
from medley.serving.ui.route_filter import RouteFilter

_HERE = Path(__file__).parent
STATUS = "/page/status"
SESSIONS = 5000  # of browsers, that are remembered
FONTS = ("system-ui", "sans-serif")  # of the reader's own machine: nothing is fetched


async def _no_address(url: str, cache_dir: str) -> str:
    """In the place of what fetches an address that a request names as its file."""
    raise gr.Error("a picture is sent, not named by its address", print_exception=False)


def add_page(
    app: FastAPI, state: State, votes: Path | None = None,
    examples: Sequence[Example] = (),
) -> Page:  # fmt: skip
    """Serves the page at `/`, behind all other routes. Where the server has a token it is the
    password of a login, whatever the name."""
    # Inside of a loop: where there is none Gradio makes one, and leaves it open.
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(asyncio.run, _added(app, state, votes, examples)).result()


async def _added(
    app: FastAPI, state: State, votes: Path | None, examples: Sequence[Example]
) -> Page:
    os.environ["GRADIO_TEMP_DIR"] = str(private_folder())
    # Its own figures of what was asked, which nobody reads here.
    os.environ |= {"GRADIO_ANALYTICS_MAX_EVENTS": "1", "GRADIO_ANALYTICS_CACHE_FREQUENCY": "9" * 9}
    processing_utils.async_ssrf_protected_download = _no_address
    page = Page(state, votes, examples)
    blocks = page.build()
    # Only a launch sets it, and without it Gradio takes files from anywhere for uploaded ones.
    blocks.has_launched = True
    blocks.state_session_capacity = SESSIONS
    # Of events at once, answers that wait for a row among them: Stop must never wait behind those.
    waiting = sum(worker.capacity + state.limits.queue for worker in state.workers.values())
    blocks._queue.max_thread_count = 2 * waiting + 64
    state.page = True
    token = state.token
    app.add_api_route(STATUS, page.status.told, methods=["GET"], include_in_schema=False)

    def knows(name: str, password: str) -> bool:
        assert token is not None
        return hmac.compare_digest(password.encode(), token.encode())

    gr.mount_gradio_app(
        app, blocks, "/", footer_links=[], run_history=False, pwa=False, mcp_server=False,
        ssr_mode=False, enable_monitoring=False, max_file_size=state.limits.body,
        allowed_paths=[file for example in page.examples for file in example.files],
        auth=knows if token is not None else None,
        auth_message="Any name, and the server's token as the password.",
        theme=gr.themes.Base(font=FONTS, font_mono=("ui-monospace", "monospace")),
        css_paths=_HERE / "page.css", js=(_HERE / "page.js").read_text(encoding="utf-8"),
        # Before the library's first request, which is sent before `js` runs.
        head=f"<script>{(_HERE / 'connection.js').read_text(encoding='utf-8')}</script>",
    )  # fmt: skip
    app.add_middleware(RouteFilter)
    # Open tabs keep a connection, for which a server that closes would wait.
    (mounted,) = (route.app for route in app.routes if isinstance(route, Mount))
    assert isinstance(mounted, App)
    state.closing.append(mounted.stop_event.set)
    return page
