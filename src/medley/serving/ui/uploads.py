"""Quotas of the files of the web UI: uploads of a session, and all files together.

Gradio itself limits only the size of a file, and leaves the parts of interrupted uploads on disk.
Here it receives only complete bodies, after the quotas were checked.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from gradio.routes import App
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from medley.serving.app import UPLOAD_PATH
from medley.serving.json_body import check_structure
from medley.serving.limits import Limits, RequestError, ServerBusyError
from medley.serving.request_body import read_body, retry_headers
from medley.serving.ui.image_store import delete_unused

UPLOAD_SECONDS = 3600.0  # time after which an upload counts no longer, and may be deleted
FULL_RETRY_SECONDS = 600
PIECE = 1 << 18  # bytes of a body that Gradio reads at once


@dataclass
class _Upload:
    """An upload of a session: `size` in bytes, and whether it is in the folder."""

    size: int
    files: int
    is_written: bool = False
    time: float = field(default_factory=time.monotonic)


class UploadQuota:
    """The uploads of each session, and the size of the folder of all files of the web UI."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder, self.limits = folder, limits
        self._uploads: dict[str, list[_Upload]] = defaultdict(list)
        self._lock = threading.Lock()

    def reserve(self, session: str, size: int, files: int) -> _Upload:
        """Counts an upload that will be written to the folder.

        Deletes files that were not used for an hour if the space is needed. Raises RequestError if
        the upload exceeds the session's quota, or that of all files.
        """
        with self._lock:
            self._expire()
            self._check_session(self._uploads.get(session, []), size, files)
            self._check_space(size, files)
            upload = _Upload(size, files)
            self._uploads[session].append(upload)
            return upload

    def _expire(self) -> None:
        start = time.monotonic() - UPLOAD_SECONDS
        for session, uploads in list(self._uploads.items()):
            self._uploads[session] = [upload for upload in uploads if upload.time > start]
            if not self._uploads[session]:
                del self._uploads[session]

    def _check_session(self, uploads: list[_Upload], size: int, files: int) -> None:
        for name, count, limit in (
            ("bytes", size + sum(u.size for u in uploads), self.limits.session_upload_bytes),
            ("files", files + sum(u.files for u in uploads), self.limits.session_upload_files),
        ):
            if count > limit:
                raise RequestError(
                    f"Upload rejected: too many {name} within an hour (got {count}, limit "
                    f"{limit}). Send fewer or smaller files, or try again later.",
                    429,
                )

    def _check_space(self, size: int, files: int) -> None:
        unwritten = [u for uploads in self._uploads.values() for u in uploads if not u.is_written]
        size += sum(upload.size for upload in unwritten)
        files += sum(upload.files for upload in unwritten)
        max_size, max_files = self.limits.ui_bytes - size, self.limits.ui_files - files
        used = delete_unused(self.folder, UPLOAD_SECONDS, max_size, max_files)
        if used.size > max_size or used.files > max_files:
            raise ServerBusyError(
                "Upload rejected: the server has no space for more files.", FULL_RETRY_SECONDS
            )


class UploadGate:
    """Middleware of Gradio's application: complete, bounded bodies, and the quotas of uploads."""

    def __init__(self, app: App, quota: UploadQuota, needs_login: bool) -> None:
        self.app, self.quota, self.needs_login = app, quota, needs_login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = self._session(Request(scope)) if scope["type"] == "http" else None
        if session is None or scope["method"] != "POST":
            await self.app(scope, receive, send)  # Without a login, Gradio reads no upload.
            return
        upload = None
        try:
            data = await read_body(receive)
            if scope["path"] == UPLOAD_PATH:
                files = _count_files(Request(scope).headers.get("content-type", ""), data)
                upload = await asyncio.to_thread(self.quota.reserve, session, len(data), files)
            else:
                await asyncio.to_thread(check_structure, data)
        except ClientDisconnect:
            return
        except (HTTPException, RequestError) as error:
            await _rejection(error)(scope, receive, send)  # The web UI displays the text.
            return
        try:
            await self.app(scope, _replay(data, receive), send)
        finally:
            if upload is not None:
                upload.is_written = True

    def _session(self, request: Request) -> str | None:
        """The login of a request, or without logins its address; None if a login is missing."""
        if not self.needs_login:
            return request.client.host if request.client is not None else "unknown"
        for kind in ("access-token", "access-token-unsecure"):
            token = request.cookies.get(f"{kind}-{self.app.cookie_id}")
            if token in self.app.tokens:
                return token
        return None


def _rejection(error: HTTPException | RequestError) -> PlainTextResponse:
    if isinstance(error, HTTPException):
        return PlainTextResponse(error.detail, error.status_code, error.headers)
    return PlainTextResponse(str(error), error.status, retry_headers(error))


def _count_files(content_type: str, data: bytearray) -> int:
    """Number of parts of a multipart body, each of which may be a file."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    return max(1, data.count(b"--" + boundary) - 1) if boundary else 0


def _replay(data: bytearray, receive: Receive) -> Receive:
    """A `receive` that returns a body in pieces, so that no piece blocks the event loop."""
    offset = 0

    async def replay() -> Message:
        nonlocal offset
        if offset > len(data):
            return await receive()
        piece = bytes(data[offset : offset + PIECE])
        # An empty body is a message, too.
        offset = offset + PIECE if offset + PIECE < len(data) else len(data) + 1
        return {"type": "http.request", "body": piece, "more_body": offset < len(data)}

    return replay
