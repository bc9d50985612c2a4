"""Mounts the web UI at `/` of the server's application."""

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
from gradio.route_utils import CustomCORSMiddleware
from gradio.routes import App
from starlette.routing import Mount

from medley.serving.state import ServerState
from medley.serving.ui.examples import Example
from medley.serving.ui.image_store import private_folder
from medley.serving.ui.layout import WebUI
from medley.serving.ui.route_filter import RouteFilter
from medley.serving.ui.uploads import UploadGate, UploadQuota

_FOLDER = Path(__file__).parent
STATUS_PATH = "/ui/status"
MAX_SESSIONS = 5000  # browsers whose state is kept
FONTS = ("system-ui", "sans-serif")  # local fonts: the browser downloads none


async def _reject_url(url: str, cache_dir: str) -> str:
    """Replaces Gradio's download of a URL that a request gives in place of a file."""
    raise gr.Error("Upload the image. URLs are not supported.", print_exception=False)


def mount_ui(
    app: FastAPI,
    state: ServerState,
    feedback_dir: Path | None = None,
    examples: Sequence[Example] = (),
) -> WebUI:
    """Serves the web UI at `/`, after all other routes.

    If the server has a token, the UI has a login with the token as its password.
    """
    # Gradio needs an event loop; without a running one it creates one and never closes it.
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, _mount(app, state, feedback_dir, examples)).result()


async def _mount(
    app: FastAPI, state: ServerState, feedback_dir: Path | None, examples: Sequence[Example]
) -> WebUI:
    os.environ["GRADIO_TEMP_DIR"] = str(private_folder())
    # Effectively disables Gradio's own statistics of requests.
    os.environ |= {"GRADIO_ANALYTICS_MAX_EVENTS": "1", "GRADIO_ANALYTICS_CACHE_FREQUENCY": "9" * 9}
    processing_utils.async_ssrf_protected_download = _reject_url
    ui = WebUI(state, feedback_dir, examples)
    blocks = ui.build()
    # Only `launch` sets it. Without it, Gradio accepts any file of this machine as an upload.
    blocks.has_launched = True
    blocks.state_session_capacity = MAX_SESSIONS
    # One thread for each response that may run or wait, so that Stop never waits for them.
    jobs = sum(worker.max_num_seqs + state.limits.max_queue for worker in state.workers.values())
    blocks._queue.max_thread_count = 2 * jobs + 64
    state.has_ui = True
    token = state.token
    app.add_api_route(STATUS_PATH, ui.status.snapshot, methods=["GET"], include_in_schema=False)

    def is_valid_login(name: str, password: str) -> bool:
        assert token is not None
        return hmac.compare_digest(password.encode(), token.encode())

    gr.mount_gradio_app(
        app, blocks, "/", footer_links=[], run_history=False, pwa=False, mcp_server=False,
        ssr_mode=False, enable_monitoring=False, max_file_size=state.limits.max_body_bytes,
        allowed_paths=[file for example in ui.examples for file in example.files],
        auth=is_valid_login if token is not None else None,
        auth_message="Any user name, and the server's token as the password.",
        theme=gr.themes.Base(font=FONTS, font_mono=("ui-monospace", "monospace")),
        css_paths=_FOLDER / "ui.css", js=(_FOLDER / "ui.js").read_text(encoding="utf-8"),
        # In the head, because Gradio sends its first request before it runs `js`.
        head=f"<script>{(_FOLDER / 'connection.js').read_text(encoding='utf-8')}</script>",
    )  # fmt: skip
    app.add_middleware(RouteFilter)
    # Open tabs keep a connection; without this event the server would wait for it at shutdown.
    (mount,) = (route for route in app.routes if isinstance(route, Mount))
    mounted = mount.app
    assert isinstance(mounted, App)
    # It allows pages of all origins, with the cookie of the login, on any host but localhost.
    mounted.user_middleware = [
        m
        for m in mounted.user_middleware
        if m.cls is not CustomCORSMiddleware  # type: ignore[comparison-overlap]
    ]
    state.on_shutdown.append(mounted.stop_event.set)
    quota = UploadQuota(private_folder(), state.limits)
    mount.app = UploadGate(mounted, quota, needs_login=token is not None)
    return ui
