"""Which of Gradio's routes are there: those that the page uses.

Gradio brings others, some of which fetch any address for whoever asks, or keep talks on disk.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from medley.serving.limits import RequestError
from medley.serving.state import error_body

_API = "/gradio_api/"
_USED = (
    "app_id", "cancel", "file=", "heartbeat/", "info", "login_check", "queue/data", "queue/join",
    "reset", "run/", "startup-events", "theme.css", "token", "upload", "user",
)  # fmt: skip
_REFUSED = ("/monitoring", "/custom_component", "/run-history", "/vibe-edit", "/undo-vibe-edit")


class RouteFilter:
    """Refuses the others with 404."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not _open(scope["path"], scope["query_string"]):
            code, body = error_body(RequestError("Not Found", 404))
            await JSONResponse(body, code)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _open(path: str, query: bytes) -> bool:
    if b"deep_link" in query or path.startswith(_REFUSED):
        return False
    if not path.startswith(_API):
        return True
    own = path.removeprefix(_API)
    return own.startswith(_USED) and ":/" not in own
