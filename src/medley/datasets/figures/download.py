"""Files from web addresses: gone on with where they broke off, and never taken for whole when they
are not."""

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
from medley.images.remote import HttpOnlyRedirects, is_address
from medley.utils.files import escape_name

_PIECE = 1 << 16
_FINAL = (400, 401, 403, 404, 405, 410, 451)  # no second try will be answered otherwise


class FetchError(UserError):
    """A file that cannot be had; the message says why."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often, how long and how much. Seconds, bytes; `stopped` is asked at each piece."""

    tries: int = 5
    pause: float = 1.0  # before the second try, doubled before each further one
    timeout: float = 60.0  # without a byte
    largest: int = 8 << 30
    slowest: float = 2000.0  # bytes a second, once `timeout` has passed
    stopped: Callable[[], bool] = lambda: False


def download(
    address: str,
    path: Path,
    patience: RetryPolicy,
    size: int | None = None,
    sha256: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Fetches an http or https address to `path`, which appears whole or not at all.

    What came stays in `.NAME.part`, and the next try, or the next run, asks for the rest. Raises
    FetchError after the last try, or at once where the server says that there is no such file.
    """
    if not is_address(address):
        raise FetchError(f"{escape_name(address)}: not an http or https address")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    reason = ""
    for number in range(patience.tries):
        if number:
            sleep(patience.pause * 2 ** (number - 1))
        try:
            _fetch(address, part, patience)
            _check(part, size, sha256)
        except FetchError as error:
            raise FetchError(f"{address}: {error}") from error
        except _Wrong as error:  # what is there is no beginning of the file
            _forget(part)
            reason = str(error)
        except UnicodeEncodeError as error:
            raise FetchError(f"{escape_name(address)}: an address has no such letters") from error
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
        else:
            part.replace(path)
            _forget(part)
            return
    raise FetchError(f"{address}: {reason} ({patience.tries} tries)")


class _Wrong(Exception):
    """The bytes that came are not those of the file."""


def _fetch(address: str, part: Path, patience: RetryPolicy) -> None:
    """Appends to what is there already, where the server still has that very file."""
    have = part.stat().st_size if part.exists() else 0
    known = _known(part)
    headers = {"User-Agent": "medley", "Accept-Encoding": "identity"}
    if have and known.get("address") == address and known.get("version"):
        headers |= {"Range": f"bytes={have}-", "If-Range": known["version"]}
    elif have:
        _forget(part)
        have = 0
    opener = urllib.request.build_opener(HttpOnlyRedirects)
    quoted = urllib.parse.quote(address, safe="%/:=&?~#+!$,;'@()*[]")
    request = urllib.request.Request(quoted, headers=headers)
    try:
        answer = opener.open(request, timeout=patience.timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            raise _Wrong("it is shorter than what came of it") from error
        if error.code in _FINAL:
            raise FetchError(f"the server says {error.code} {error.reason}") from error
        raise
    with answer:
        whole = _whole_size(answer, have)
        if whole is not None and whole > patience.largest:
            raise FetchError(f"{whole} bytes, the limit is {patience.largest}")
        again = answer.status != 206
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        version = None if (version or "").startswith("W/") else version
        _note(part).write_text(json.dumps({"address": address, "version": version}))
        with open(part, "wb" if again else "ab") as file:
            begun, came = time.monotonic(), 0
            while piece := answer.read1(_PIECE):
                file.write(piece)
                came += len(piece)
                taken = time.monotonic() - begun
                if patience.stopped():
                    raise FetchError("stopped")
                if taken > patience.timeout and came / taken < patience.slowest:
                    raise OSError(f"slower than {patience.slowest:.0f} bytes a second")
                if file.tell() > patience.largest:
                    raise FetchError(f"more than {patience.largest} bytes, which is the limit")
    there = part.stat().st_size
    if whole is not None and there > whole:
        raise _Wrong(f"{there} bytes came, {whole} were promised")
    if whole is not None and there < whole:
        raise OSError(f"{there} of {whole} bytes came")


def _whole_size(answer: Any, have: int) -> int | None:
    """Bytes of the whole file. Raises _Wrong for a part that does not begin where ours ends."""
    length = answer.headers.get("Content-Length")
    if answer.status != 206:
        return None if length is None else int(length)
    unit, _, rest = (answer.headers.get("Content-Range") or "").partition(" ")
    span, _, whole = rest.partition("/")
    if unit != "bytes" or not span.startswith(f"{have}-"):
        raise _Wrong(f"asked for the bytes from {have} on, got {rest or 'something else'}")
    return int(whole) if whole.isdigit() else None


def _check(part: Path, size: int | None, sha256: str | None) -> None:
    found = part.stat().st_size
    if size is not None and found != size:
        raise _Wrong(f"{found} bytes, expected {size}")
    if sha256 is not None and hash_of(part) != sha256:
        raise _Wrong("its SHA-256 is not the expected one")


def hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _known(part: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(_note(part).read_text())
    except (OSError, ValueError):
        return {}
    return found


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)
