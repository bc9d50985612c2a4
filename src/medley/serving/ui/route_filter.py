"""Blocks the routes of Gradio that the web UI does not use.

Some of them fetch any URL for the client, or save conversations to disk.
"""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from medley.serving.error_responses import openai_error
from medley.serving.limits import RequestError

_API = "/gradio_api/"
_ALLOWED = (
    "app_id", "cancel", "file=", "heartbeat/", "info", "login_check", "queue/data", "queue/join",
    "reset", "run/", "startup-events", "theme.css", "token", "upload", "user",
)  # fmt: skip
_BLOCKED = ("/monitoring", "/custom_component", "/run-history", "/vibe-edit", "/undo-vibe-edit")


class RouteFilter:
    """Middleware that returns status 404 for a blocked route."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_allowed(scope["path"], scope["query_string"]):
            status, body = openai_error(RequestError("Not Found", 404))
            await JSONResponse(body, status)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _is_allowed(path: str, query: bytes) -> bool:
    if b"deep_link" in query or path.startswith(_BLOCKED):
        return False
    if not path.startswith(_API):
        return True
    route = path.removeprefix(_API)
    return route.startswith(_ALLOWED) and ":/" not in route
