"""Images at URLs: fetched completely, within limits, over http and https only."""

from __future__ import annotations

import http.server
import io
import threading
import time
from collections.abc import Iterator

import pytest
from PIL import Image

from medley.images.preprocess import ImageError
from medley.images.remote import fetch_image


@pytest.fixture
def server() -> Iterator[str]:
    """Serves an image, a large file, a text named .png, and a redirect to a local file."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(buffer, "png")
    answers = {"/good.png": buffer.getvalue(), "/large.png": bytes(3000), "/text.png": b"hello"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
                return
            self.send_response(200)
            if self.path == "/truncated.png":
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if self.path == "/truncated.png":
                self.wfile.write(b"ffff\r\nabc")
            elif self.path == "/slow.png":
                for _ in range(20):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.05)
            else:
                self.wfile.write(answers[self.path])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_images_are_fetched_within_limits(server: str) -> None:
    assert fetch_image(f"{server}/good.png").size == (9, 7)
    with pytest.raises(ImageError, match=r"too large \(expected at most 0 MB"):
        fetch_image(f"{server}/large.png", max_bytes=2000)
    with pytest.raises(ImageError, match="Unsupported image format"):
        fetch_image(f"{server}/text.png")
    with pytest.raises(ImageError, match=r"Redirects to file:///etc/passwd|Cannot fetch"):
        fetch_image(f"{server}/redirect")
    with pytest.raises(ImageError, match="Not an http or https URL"):
        fetch_image("file:///etc/passwd")
    for broken in (f"{server}/truncated.png", "http://127.0.0.1:abc/x.png", f"{server}/a b.png"):
        with pytest.raises(ImageError, match="Cannot fetch the image"):
            fetch_image(broken)
    with pytest.raises(ImageError, match="Volumes are not fetched"):
        fetch_image(f"{server}/x.nii.gz")
    with pytest.raises(ImageError, match="Not complete after 0 s"):
        fetch_image(f"{server}/slow.png", max_seconds=0.2)
