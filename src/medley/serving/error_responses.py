"""Error responses in OpenAI's format, with OpenAI's codes."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from medley.errors import UserError
from medley.generation.scheduler import ContextLengthError
from medley.serving.limits import QueueFullError, RequestError
from medley.serving.request_body import retry_headers
from medley.serving.unknown_urls import shown_path, unknown_url
from medley.utils.files import escape_name

log = logging.getLogger("medley.serving")
NO_RETRY = {"x-should-retry": "false"}  # OpenAI's client would repeat a request that timed out.
MAX_MESSAGE = 1000  # characters of an error message; some messages quote the request
_SHOWN = 80  # characters of a path or a header that a message quotes
_CODES = {
    400: "invalid_value", 401: "invalid_api_key", 403: "permission_denied", 404: "unknown_url",
    405: "method_not_supported", 408: "timeout", 413: "request_too_large",
    429: "rate_limit_exceeded", 499: "client_disconnected", 500: "internal_error",
    503: "service_unavailable",
}  # fmt: skip
_MISSING = {"model": "model_not_found", "response_id": "response_not_found"}


class CodedError(RequestError):
    """A request is rejected for a reason with a code of its own; other codes are by status."""

    def __init__(self, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.code = code


def openai_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and JSON body of an error."""
    status, param, kind = 500, None, "server_error"
    message = f"Internal server error ({type(error).__name__})."
    if isinstance(error, RequestError):
        status, param, message = error.status, error.param, str(error)
    elif isinstance(error, UserError):
        status, message = 400, str(error)
    if isinstance(error, QueueFullError):
        kind = "rate_limit_error"
    elif status < 500 and status != 408:  # A request that timed out was valid.
        kind = "invalid_request_error"
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]}…"
    code = error.code if isinstance(error, CodedError) else _CODES.get(status)
    if isinstance(error, ContextLengthError):
        code = "context_length_exceeded"
    if status == 404:
        code = _MISSING.get(param or "", "unknown_url")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def logged_error(error: Exception, what: str) -> tuple[int, dict[str, Any]]:
    """`openai_error`. An internal error is logged with its traceback; `what` has failed."""
    if not isinstance(error, UserError):
        log.error("%s", what, exc_info=error)
    return openai_error(error)


def add_error_handlers(app: FastAPI) -> None:
    """Gives every error response of an application OpenAI's format."""
    for kind, handler in (
        (RequestError, on_error), (RequestValidationError, on_validation_error),
        (HTTPException, on_http_error), (Exception, on_error),
    ):  # fmt: skip
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]  # narrower than Exception


async def on_error(request: Request, error: Exception) -> Response:
    status, body = logged_error(error, f"{request.method} {request.url.path}")
    headers = retry_headers(error) | (NO_RETRY if status == 408 else {})
    return JSONResponse(body, status, headers)


async def on_validation_error(request: Request, error: RequestValidationError) -> Response:
    content_type = request.headers.get("content-type", "")
    return await on_error(request, validation_error(error, content_type))


def validation_error(error: RequestValidationError, content_type: str) -> RequestError:
    """The first error with its field, without the value, which may be an image."""
    # FastAPI parses a body only if it is declared as JSON.
    if isinstance(error.body, bytes | bytearray):
        got = f"the Content-Type is {escape_name(content_type[:_SHOWN])!r}"
        got = got if content_type else "the request has no Content-Type"
        return CodedError(
            f"body: Not declared as JSON ({got}). Send Content-Type: application/json.",
            "invalid_content_type",
        )
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        position, reason = first["loc"][-1], first["ctx"]["error"]
        return CodedError(f"body: Not JSON at character {position} ({reason}).", "invalid_json")
    field = _field_name(first["loc"])
    if field == "body" and error.body is None:
        return CodedError("body: Empty. Send a JSON object.", "invalid_json")
    return CodedError(f"{field}: {first['msg'].removesuffix('.')}.", _code_of(first["type"]), field)


def _field_name(loc: tuple[Any, ...]) -> str:
    """The field at a location, for example `messages[0]`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc if part != "body"]
    return escape_name("".join(parts).removeprefix(".")[:_SHOWN]) or "body"


def _code_of(kind: str) -> str:
    """OpenAI's code of an error of pydantic."""
    if kind in ("unknown_parameter", "unsupported_value"):
        return kind
    if kind == "missing":
        return "missing_required_parameter"
    return "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"


async def on_http_error(request: Request, error: HTTPException) -> Response:
    response = await on_error(request, _http_error(request, error))
    response.headers.update(error.headers or {})  # for example Allow, with status 405
    return response


def _http_error(request: Request, error: HTTPException) -> RequestError:
    cause = error.__cause__
    if isinstance(cause, RequestError):  # of a body beyond a limit
        return cause
    if error.status_code == 404:
        return unknown_url(request)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return RequestError(
            f"{shown_path(request.url.path)} does not support {request.method}. Use {allowed}.", 405
        )
    if error.status_code == 400 and isinstance(cause, Exception):  # FastAPI cannot parse the body.
        return _unreadable_body(cause)
    return RequestError(str(error.detail), error.status_code)


def _unreadable_body(cause: Exception) -> RequestError:
    """Why a body cannot be parsed as JSON."""
    if isinstance(cause, json.JSONDecodeError):
        reason = f"Not JSON at character {cause.pos} ({cause.msg})"
    elif isinstance(cause, UnicodeDecodeError):
        reason = f"Not UTF-8 at byte {cause.start}"
    elif isinstance(cause, RecursionError):
        reason = "JSON is nested too deeply"
    else:
        reason = f"Not JSON ({str(cause).partition(';')[0]})"
    return CodedError(f"body: {reason}.", "invalid_json")
