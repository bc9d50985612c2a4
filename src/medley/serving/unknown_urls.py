"""Errors of addresses that are not served: what is served, and where the API is."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.routing import BaseRoute, Route

from medley.serving.limits import RequestError
from medley.utils.files import escape_name

BASE = "/v1"
_SHOWN = 80  # characters of a path that a message quotes


def add_hints(app: FastAPI) -> None:
    """Adds routes for the API's paths without `/v1`, which would reach the web UI."""
    paths = [line.split()[1] for line in served_paths(app)]
    for path in dict.fromkeys(path for path in paths if path.startswith(f"{BASE}/")):
        short = path.removeprefix(BASE)
        if short not in paths:
            app.router.routes.append(_hint(short))


def served_paths(app: FastAPI) -> list[str]:
    """Method and path of each route of the API, for example `POST /v1/completions`."""
    operations = app.openapi()["paths"]
    return [f"{method.upper()} {path}" for path, item in operations.items() for method in item]


def _hint(path: str) -> BaseRoute:
    async def reject(request: Request) -> None:
        raise unknown_url(request)

    methods = ["GET", "POST", "DELETE", "OPTIONS"]
    return Route(path, reject, methods=methods, include_in_schema=False, name="hint")


def unknown_url(request: Request) -> RequestError:
    """The error of a request to an address that is not served."""
    path, lines = shown_path(request.url.path), served_paths(request.app)
    own = f"{request.method} {path} is not served."
    base = f"{str(request.base_url).rstrip('/')}{BASE}"
    if any(_matches(line.split()[1], BASE + request.url.path) for line in lines):
        return RequestError(f"{own} Use {BASE}{path} (base URL {base}).", 404)
    return RequestError(
        f"{own} The base URL of the API is {base}. Served are {', '.join(lines)}.", 404
    )


def shown_path(path: str) -> str:
    """A path as a message or the log quotes it: short, and without control characters."""
    return escape_name(repr(path[:_SHOWN])[1:-1])


def _matches(template: str, path: str) -> bool:
    """Whether a path matches a template such as `/v1/models/{name}`."""
    parts, others = template.split("/"), path.rstrip("/").split("/")
    return len(parts) == len(others) and all(
        own == other or (own.startswith("{") and other)
        for own, other in zip(parts, others, strict=True)
    )
