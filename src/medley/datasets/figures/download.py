"""Resumable downloads over http and https; a file appears only when it is complete."""

from __future__ import annotations

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medley.errors import UserError
from medley.images.remote import HttpOnlyRedirects, is_http_url
from medley.utils.files import escape_name
from medley.utils.temporary_files import exclusive, temporary_path

_CHUNK = 1 << 16  # bytes
_PERMANENT_ERRORS = (400, 401, 403, 404, 405, 410, 451)  # statuses that a retry does not change


class FetchError(UserError):
    """A download failed for good; the message contains the reason."""


@dataclass(frozen=True)
class RetryPolicy:
    """Limits of a download.

    Attributes:
        max_retries: retries after a failed attempt
        pause: seconds before the first retry, doubled before each further one
        timeout: seconds without a byte after which an attempt fails
        max_bytes: maximum size of a file
        min_rate: minimum bytes per second, checked once `timeout` seconds have passed
        cancelled: polled after each chunk; True ends the download with FetchError
    """

    max_retries: int = 4
    pause: float = 1.0
    timeout: float = 60.0
    max_bytes: int = 8 << 30
    min_rate: float = 2000.0
    cancelled: Callable[[], bool] = lambda: False


def download(
    url: str,
    path: Path,
    policy: RetryPolicy,
    size: int | None = None,
    sha256: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Downloads a file to `path`, which appears only when it is complete and verified.

    Received bytes stay in `.NAME.part`; the next attempt, or the next run, requests the rest. If
    another run is downloading the same file, this one uses a name of its own. Raises FetchError
    after the last attempt, or at once if the server reports a permanent error.
    """
    if not is_http_url(url):
        raise FetchError(f"{escape_name(url)}: Not an http or https URL.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with exclusive(part.with_name(f"{part.name}.lock")) as alone:
        if alone:
            _download(url, path, part, policy, size, sha256, sleep)
            return
    with temporary_path(path) as own:
        try:
            _download(url, path, own, policy, size, sha256, sleep)
        finally:
            _remove(own)


def _download(
    url: str,
    path: Path,
    part: Path,
    policy: RetryPolicy,
    size: int | None,
    sha256: str | None,
    sleep: Callable[[float], None],
) -> None:
    reason = ""
    for attempt in range(policy.max_retries + 1):
        if attempt:
            sleep(policy.pause * 2 ** (attempt - 1))
        try:
            _fetch(url, part, policy)
            _verify(part, size, sha256)
        except FetchError as error:
            raise FetchError(f"{url}: {error}") from error
        except _Mismatch as error:  # The received bytes are not the beginning of the file.
            _remove(part)
            reason = str(error)
        except UnicodeEncodeError as error:
            raise FetchError(f"{escape_name(url)}: Invalid characters in the URL.") from error
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
        else:
            part.replace(path)
            _remove(part)
            return
    raise FetchError(f"{url}: {reason} ({policy.max_retries + 1} attempts)")


class _Mismatch(Exception):
    """The received bytes do not belong to the requested file."""


def _fetch(url: str, part: Path, policy: RetryPolicy) -> None:
    """Appends to the bytes received so far if the server still has the same version."""
    received = part.stat().st_size if part.exists() else 0
    source = _read_source(part)
    headers = {"User-Agent": "medley", "Accept-Encoding": "identity"}
    if received and source.get("address") == url and source.get("version"):
        headers |= {"Range": f"bytes={received}-", "If-Range": source["version"]}
    elif received:
        _remove(part)
        received = 0
    opener = urllib.request.build_opener(HttpOnlyRedirects)
    quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    request = urllib.request.Request(quoted, headers=headers)
    try:
        response = opener.open(request, timeout=policy.timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            raise _Mismatch(f"the file is shorter than the {received} bytes received") from error
        if error.code in _PERMANENT_ERRORS:
            raise FetchError(f"The server returned {error.code} {error.reason}.") from error
        raise
    with response:
        total = _total_size(response, received)
        if total is not None and total > policy.max_bytes:
            raise FetchError(f"The file has {total} bytes (limit {policy.max_bytes}).")
        is_full = response.status != 206
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        version = None if (version or "").startswith("W/") else version
        _source_file(part).write_text(json.dumps({"address": url, "version": version}))
        with open(part, "wb" if is_full else "ab") as file:
            start, count = time.monotonic(), 0
            while chunk := response.read1(_CHUNK):
                file.write(chunk)
                count += len(chunk)
                elapsed = time.monotonic() - start
                if policy.cancelled():
                    raise FetchError("The download was cancelled.")
                if elapsed > policy.timeout and count / elapsed < policy.min_rate:
                    raise OSError(f"slower than {policy.min_rate:.0f} bytes per second")
                if file.tell() > policy.max_bytes:
                    raise FetchError(f"The file is larger than the limit of {policy.max_bytes}.")
    received = part.stat().st_size
    if total is not None and received > total:
        raise _Mismatch(f"received {received} bytes, expected {total}")
    if total is not None and received < total:
        raise OSError(f"received {received} of {total} bytes")


def _total_size(response: Any, received: int) -> int | None:
    """Bytes of the file. Raises _Mismatch for a range that does not start at `received`."""
    length = response.headers.get("Content-Length")
    if response.status != 206:
        return None if length is None else int(length)
    unit, _, rest = (response.headers.get("Content-Range") or "").partition(" ")
    span, _, total = rest.partition("/")
    if unit != "bytes" or not span.startswith(f"{received}-"):
        raise _Mismatch(f"requested bytes from {received}, received range {rest or 'none'}")
    return int(total) if total.isdigit() else None


def _verify(part: Path, size: int | None, sha256: str | None) -> None:
    actual = part.stat().st_size
    if size is not None and actual != size:
        raise _Mismatch(f"received {actual} bytes, expected {size}")
    if sha256 is not None and file_sha256(part) != sha256:
        raise _Mismatch("the SHA-256 differs from the expected one")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _source_file(part: Path) -> Path:
    """The URL and version of an incomplete file are recorded next to it."""
    return part.with_name(f"{part.name}.json")


def _read_source(part: Path) -> dict[str, Any]:
    try:
        source: dict[str, Any] = json.loads(_source_file(part).read_text())
    except (OSError, ValueError):
        return {}
    return source


def _remove(part: Path) -> None:
    part.unlink(missing_ok=True)
    _source_file(part).unlink(missing_ok=True)
