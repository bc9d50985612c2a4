"""Access to the API for pages of other origins in a browser (CORS)."""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from medley.errors import UserError

# Neither the web UI, which has a login with a cookie, nor the routes of LLaVA's programs.
API_PATHS = ("/v1/", "/health", "/openapi.json")
_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[^\s/?#@:\[\]*]+|\[[0-9a-f:]+\])(:(?P<port>\d+))?",
    re.IGNORECASE,
)
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def parse_origins(origins: Collection[str]) -> list[str]:
    """Origins as browsers send them. Raises UserError for anything but an origin, or `*` alone."""
    if "*" in origins and len(set(origins)) > 1:
        raise UserError("--allowed_origins: * allows all origins. Give * or origins, not both.")
    return ["*"] if "*" in origins else [_parse_origin(origin) for origin in origins]


def _parse_origin(origin: str) -> str:
    match = _ORIGIN.fullmatch(origin)
    if match is None or match["scheme"].lower() == "file":
        raise UserError(
            f"--allowed_origins: Not an origin (got {origin!r}, expected scheme://host or "
            "scheme://host:port without a path, for example http://localhost:5173, or * for all)."
        )
    origin = origin.lower()
    port = _DEFAULT_PORTS.get(match["scheme"].lower())
    return origin.removesuffix(f":{port}") if match["port"] == port else origin


class ApiCORSMiddleware(CORSMiddleware):
    """Adds CORS headers to the routes of the API.

    Browsers do not send cookies with such requests, so that a page can use the API only with a
    token that it has itself.
    """

    def __init__(self, app: ASGIApp, allow_origins: Collection[str]) -> None:
        super().__init__(
            app, allow_origins, allow_methods=("GET", "POST"), allow_headers=("*",),
            allow_credentials=False, expose_headers=("Retry-After", "x-request-id"),
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(API_PATHS):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)
