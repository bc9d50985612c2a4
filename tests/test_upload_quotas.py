"""Quotas of the files that users upload to the web UI."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect
from running_server import RunningServer
from test_connection import connect, read_to_end, wait_until
from ui_in_browser import CHROMIUM, MESSAGE, browser, scan_file

from medley.serving.limits import Limits, RequestError, ServerBusyError
from medley.serving.ui.image_store import EXAMPLES, ImageStore, delete_unused, private_folder
from medley.serving.ui.mount import mount_ui
from medley.serving.ui.uploads import UPLOAD_SECONDS, UploadQuota

__all__ = ["browser"]  # fixture
WAIT = 60.0  # seconds until a test gives up
QUOTA = Limits(session_upload_bytes=1000, session_upload_files=4, ui_bytes=3000, ui_files=9)


# --- the quotas -------------------------------------------------------------------------------


def write(path: Path, size: int, age: float = 0.0) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_bytes_of_a_session_are_limited(tmp_path: Path) -> None:
    quota = UploadQuota(tmp_path, QUOTA)
    quota.reserve("a", 600, 1).is_written = True
    with pytest.raises(RequestError, match=r"too many bytes within an hour \(got 1001, limit 1000"):
        quota.reserve("a", 401, 1)
    quota.reserve("a", 400, 1)  # A rejected upload does not count.
    quota.reserve("b", 1000, 1)


def test_files_of_a_session_are_limited(tmp_path: Path) -> None:
    quota = UploadQuota(tmp_path, QUOTA)
    quota.reserve("a", 10, 3)
    with pytest.raises(RequestError, match=r"too many files within an hour \(got 5, limit 4\)"):
        quota.reserve("a", 10, 2)


def test_uploads_of_a_session_expire(tmp_path: Path) -> None:
    quota = UploadQuota(tmp_path, QUOTA)
    for _ in range(2):
        upload = quota.reserve("a", 1000, 1)
        upload.time -= UPLOAD_SECONDS + 1
        upload.is_written = True


def test_all_files_are_limited_and_unused_ones_are_deleted(tmp_path: Path) -> None:
    quota = UploadQuota(tmp_path, QUOTA)
    oldest = write(tmp_path / "a" / "scan.png", 1000, UPLOAD_SECONDS + 20)
    old = write(tmp_path / "b" / "scan.png", 1000, UPLOAD_SECONDS + 10)
    recent = write(tmp_path / "c" / "scan.png", 1000)
    example = write(tmp_path / EXAMPLES / "scan.png", 5000, UPLOAD_SECONDS + 30)
    quota.reserve("a", 900, 1).is_written = True
    assert [path.exists() for path in (oldest, old, recent, example)] == [False, True, True, True]
    write(tmp_path / "d" / "scan.png", 1900)
    with pytest.raises(ServerBusyError, match="no space for more files"):
        quota.reserve("b", 200, 1)
    assert not old.exists() and recent.exists()


def test_number_of_all_files_is_limited(tmp_path: Path) -> None:
    quota = UploadQuota(tmp_path, QUOTA)
    for number in range(7):
        write(tmp_path / str(number), 1)
    quota.reserve("a", 1, 2)  # not yet written
    with pytest.raises(ServerBusyError):
        quota.reserve("b", 1, 1)


def test_uploads_that_are_not_yet_written_count(tmp_path: Path) -> None:
    quota = UploadQuota(tmp_path, QUOTA)
    for session in "abc":
        quota.reserve(session, 900, 1)
    with pytest.raises(ServerBusyError):
        quota.reserve("d", 900, 1)


def test_store_deletes_its_oldest_images_beyond_the_limit(tmp_path: Path) -> None:
    limits = Limits(ui_bytes=10_000)
    store = ImageStore(tmp_path, limits=limits)
    for number in range(40):
        path = store._save(bytes([number]) * 1000, store.folder)
        os.utime(path, (time.time() - 5000 + number,) * 2)
    images = sorted(path.read_bytes()[0] for path in store.folder.iterdir())
    assert len(images) <= 11 and images == list(range(40 - len(images), 40))


# --- the server -------------------------------------------------------------------------------


@pytest.fixture
def running() -> Iterator[RunningServer]:
    used = delete_unused(private_folder(), 0.0, 1 << 40, 1 << 20)
    limits = Limits(
        session_upload_bytes=100_000, session_upload_files=4, ui_bytes=used.size + 250_000,
        body_timeout=2.0, max_body_bytes=1 << 20,
    )  # fmt: skip
    server = RunningServer(limits, token="secret", configure=mount_ui)
    yield server
    server.stop()


@contextmanager
def log_in(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=WAIT) as client:
        login = client.post("/login", data={"username": "me", "password": "secret"})
        assert login.status_code == 200
        yield client


def upload(client: httpx.Client, *sizes: int) -> httpx.Response:
    files = [("files", ("scan.png", os.urandom(size))) for size in sizes]
    return client.post("/gradio_api/upload", files=files)


def files_of_ui() -> set[Path]:
    return {path for path in private_folder().rglob("*") if path.is_file()}


@pytest.mark.slow
def test_uploads_beyond_a_quota_are_rejected_and_not_stored(running: RunningServer) -> None:
    with httpx.Client(base_url=running.url) as stranger:
        assert upload(stranger, 100).status_code == 401
    with log_in(running.url) as first, log_in(running.url) as second:
        assert upload(first, 60_000).status_code == 200
        before = files_of_ui()
        response = upload(first, 60_000)
        assert response.status_code == 429 and response.headers["content-type"][:10] == "text/plain"
        assert response.text.startswith("Upload rejected: too many bytes within an hour (got 12")
        assert upload(first, 10, 10, 10, 10).text.startswith("Upload rejected: too many files")
        assert files_of_ui() == before
        assert len(upload(first, 10, 10).json()) == 2
        assert upload(second, 90_000).status_code == 200
    with log_in(running.url) as third, log_in(running.url) as fourth:
        assert upload(third, 80_000).status_code == 200
        response = upload(fourth, 90_000)
        assert (response.status_code, response.headers["retry-after"]) == (503, "600")
        assert "no space for more files" in response.text


@pytest.mark.slow
def test_uploaded_file_is_stored_unchanged(running: RunningServer) -> None:
    data = os.urandom(80_000)
    with log_in(running.url) as client:
        (path,) = client.post("/gradio_api/upload", files={"files": data}).json()
    assert Path(path).read_bytes() == data


def connect_with_half_an_upload(client: httpx.Client) -> socket.socket:
    cookies = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    request = client.build_request("POST", "/gradio_api/upload", files={"files": b"x" * 90_000})
    lines = [f"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nCookie: {cookies}"]
    lines += [f"{name}: {value}" for name, value in request.headers.items() if name[0] == "c"]
    connection = connect(str(client.base_url).rstrip("/"))
    connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + request.read()[:50_000])
    return connection


@pytest.mark.slow
def test_slow_upload_is_rejected_and_leaves_no_file(running: RunningServer) -> None:
    with log_in(running.url) as client:
        before = files_of_ui()
        with connect_with_half_an_upload(client) as connection:
            received = read_to_end(connection)
        assert b"408" in received and b"not complete after 2 s" in received
        wait_until(lambda: running.state.body_memory.used == 0)
        assert files_of_ui() == before


@pytest.mark.slow
def test_interrupted_upload_leaves_no_file() -> None:
    running = RunningServer(Limits(), token="secret", configure=mount_ui)
    with log_in(running.url) as client:
        before = files_of_ui()
        with connect_with_half_an_upload(client):
            wait_until(lambda: running.state.body_memory.used == 50_000)
        wait_until(lambda: running.state.body_memory.used == 0)
        assert files_of_ui() == before
    running.stop()


@pytest.mark.slow
def test_flood_to_a_handler_of_the_ui_is_rejected(running: RunningServer) -> None:
    flood = b'{"data": [' + b"{}," * 300_000 + b"{}]}"
    headers = {"Content-Type": "application/json"}
    with log_in(running.url) as client:
        response = client.post("/gradio_api/queue/join", content=flood, headers=headers)
        assert response.status_code == 400 and "too many JSON values" in response.text
        large = client.post("/gradio_api/queue/join", content=b" " * (5 << 20), headers=headers)
        assert large.status_code == 413


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="Chromium is not installed")
def test_rejected_upload_displays_the_reason(browser: Browser, tmp_path: Path) -> None:
    server = RunningServer(Limits(session_upload_bytes=1000), configure=mount_ui)
    page = browser.new_context().new_page()
    page.goto(server.url)
    expect(page.locator(MESSAGE)).to_be_visible(timeout=60_000)
    page.set_input_files("#message input[type=file]", [str(scan_file(tmp_path))])
    expect(page.get_by_text("Upload rejected: too many bytes within an hour")).to_be_visible()
    page.context.close()
    server.stop()
