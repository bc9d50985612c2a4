"""The API for pages of other origins in a browser (CORS); the web UI, which is closed to them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from running_server import RunningServer

from medley.errors import UserError
from medley.serving.cors import parse_origins
from medley.serving.limits import Limits

CHAT = "/v1/chat/completions"
SHORT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "mode": "text",
         "max_tokens": 2}  # fmt: skip
TOKEN = "secret of the server"
ORIGIN = "http://localhost:5173"


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    server = RunningServer(Limits())
    yield server
    server.stop()


def serve_origins(*origins: str, token: str | None = None) -> RunningServer:
    return RunningServer(Limits(), token=token, allowed_origins=origins)


def preflight(running: RunningServer, path: str, origin: str = ORIGIN) -> httpx.Response:
    headers = {
        "Origin": origin, "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }  # fmt: skip
    return httpx.options(running.url + path, headers=headers)


def test_no_page_may_use_the_api_by_default(running: RunningServer) -> None:
    assert preflight(running, CHAT).status_code == 405
    response = httpx.get(f"{running.url}/v1/models", headers={"Origin": ORIGIN})
    assert not any(name.startswith("access-control") for name in response.headers)


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    server = serve_origins(ORIGIN, "app://obsidian.md", token=TOKEN)
    yield server
    server.stop()


def test_pages_of_a_named_origin_may_use_the_api(
    shared: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for origin in (ORIGIN, "app://obsidian.md"):
        response = preflight(shared, CHAT, origin)  # Browsers send it without the token.
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == origin
        assert "x-stainless-os" in response.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in response.headers
    headers = {"Origin": ORIGIN, "Authorization": f"Bearer {TOKEN}"}
    monkeypatch.setattr(shared.state, "worker", lambda name: 1 / 0)
    for response, status in (
        (httpx.get(f"{shared.url}/v1/models", headers=headers), 200),
        (httpx.get(f"{shared.url}/v1/models", headers={"Origin": ORIGIN}), 401),
        (httpx.post(shared.url + CHAT, json={}, headers=headers), 400),
        (httpx.get(f"{shared.url}/v1/nothing", headers=headers), 404),
        (httpx.post(shared.url + CHAT, json=SHORT, headers=headers), 500),
        (httpx.get(f"{shared.url}/health", headers={"Origin": ORIGIN}), 200),
    ):
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert "Origin" in response.headers["vary"]


def test_other_pages_and_other_routes_have_no_access(shared: RunningServer) -> None:
    for origin in ("http://localhost:5174", "https://localhost:5173", f"{ORIGIN}.evil.org", "null"):
        response = preflight(shared, CHAT, origin)
        assert response.status_code == 400
        assert "access-control-allow-origin" not in response.headers
    for path in ("/worker_generate_stream", "/worker_get_status", "/metrics", "/"):
        assert "access-control-allow-origin" not in preflight(shared, path).headers


def test_all_pages_may_use_the_api_without_cookies() -> None:
    public = serve_origins("*")
    response = httpx.get(f"{public.url}/v1/models", headers={"Origin": ORIGIN, "Cookie": "a=b"})
    assert preflight(public, CHAT, "http://any.org").status_code == 200
    public.stop()
    assert response.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize(
    ("origin", "parsed"),
    [
        (ORIGIN, ORIGIN), ("HTTPS://Example.org", "https://example.org"),
        ("http://a.org:80", "http://a.org"), ("https://a.org:443", "https://a.org"),
        ("https://a.org:80", "https://a.org:80"), ("http://[::1]:3000", "http://[::1]:3000"),
        ("chrome-extension://abc", "chrome-extension://abc"), ("*", "*"),
    ],
)  # fmt: skip
def test_origins_are_compared_as_browsers_send_them(origin: str, parsed: str) -> None:
    assert parse_origins([origin]) == [parsed]


@pytest.mark.parametrize(
    "origins",
    [
        ["http://a.org/"], ["http://a.org/x"], ["a.org"], ["localhost:5173"], ["null"], [""],
        ["http://"], ["http://*.a.org"], ["http://me@a.org"], ["file:///x"], ["file://x"],
        ["http://a.org http://b.org"], ["http://a.org,http://b.org"], ["http://a.org:x"],
        ["*", ORIGIN],
    ],
)  # fmt: skip
def test_anything_but_an_origin_is_rejected(origins: list[str]) -> None:
    with pytest.raises(UserError, match="--allowed_origins"):
        parse_origins(origins)


def test_forms_of_other_pages_cannot_use_the_api(running: RunningServer) -> None:
    """Browsers send these content types across origins without asking the server."""
    for content_type in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        headers = {"Origin": "http://evil.org", "Content-Type": content_type}
        response = httpx.post(running.url + CHAT, content=json.dumps(SHORT), headers=headers)
        assert response.status_code == 400
        assert "Send Content-Type: application/json" in response.json()["error"]["message"]


@pytest.mark.slow
def test_the_web_ui_hides_no_error_of_the_api_and_is_closed_to_other_pages() -> None:
    from medley.serving.ui.mount import mount_ui

    server = RunningServer(Limits(), configure=mount_ui, allowed_origins=[ORIGIN])
    for method, path, status in (("POST", "/v1/moderations", 404), ("GET", CHAT, 405)):
        response = httpx.request(method, server.url + path, headers={"Origin": ORIGIN})
        assert response.status_code == status
        assert response.json()["error"]["code"] in ("unknown_url", "method_not_supported")
        assert response.headers["access-control-allow-origin"] == ORIGIN
    for host in ("127.0.0.1", "medley.example.org"):
        for origin in (ORIGIN, "http://evil.org"):
            page = httpx.get(server.url, headers={"Origin": origin, "Host": host})
            assert page.status_code == 200
            assert not any(name.startswith("access-control") for name in page.headers)
    server.stop()
