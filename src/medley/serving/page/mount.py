"""The page in the server's own process, at `/`."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from fastapi import FastAPI

from medley.serving.page.examples import Example
from medley.serving.page.layout import Page
from medley.serving.state import State

_HERE = Path(__file__).parent
FONTS = ("system-ui", "sans-serif")  # of the reader's own machine: nothing is fetched


def add_page(
    app: FastAPI, state: State, votes: Path | None = None,
    examples: Sequence[Example] = (),
) -> Page:  # fmt: skip
    """Serves the page at `/`, behind all other routes. Where the server has a token it is the
    password of a login, whatever the name."""
    page = Page(state, votes, examples)
    state.page = True
    token = state.token

    def knows(name: str, password: str) -> bool:
        assert token is not None
        return hmac.compare_digest(password.encode(), token.encode())

    gr.mount_gradio_app(
        app, page.build(), "/", footer_links=[], run_history=False, pwa=False, mcp_server=False,
        ssr_mode=False, enable_monitoring=False, max_file_size=state.limits.body,
        allowed_paths=[str(page.files), *(file for e in page.examples for file in e.files)],
        auth=knows if token is not None else None,
        auth_message="Any name, and the server's token as the password.",
        theme=gr.themes.Base(font=FONTS, font_mono=("ui-monospace", "monospace")),
        css_paths=_HERE / "page.css", js=(_HERE / "page.js").read_text(encoding="utf-8"),
    )  # fmt: skip
    return page
