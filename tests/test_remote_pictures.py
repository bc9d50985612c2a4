"""Pictures at addresses: fetched whole, within limits, and nothing else."""

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
    """Serves a picture, a large answer, a lie, and a way to a file."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(buffer, "png")
    answers = {"/good.png": buffer.getvalue(), "/large.png": bytes(3000), "/lie.png": b"hello"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
                return
            self.send_response(200)
            if self.path == "/torn.png":
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if self.path == "/torn.png":
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


def test_a_picture_at_an_address(server: str) -> None:
    assert fetch_image(f"{server}/good.png").size == (9, 7)
    with pytest.raises(ImageError, match="larger than 0 MB"):
        fetch_image(f"{server}/large.png", largest=2000)
    with pytest.raises(ImageError, match="not a picture"):
        fetch_image(f"{server}/lie.png")
    with pytest.raises(ImageError, match=r"leads to file:///etc/passwd|cannot be fetched"):
        fetch_image(f"{server}/away")
    with pytest.raises(ImageError, match="not an http or https address"):
        fetch_image("file:///etc/passwd")
    for broken in (f"{server}/torn.png", "http://127.0.0.1:abc/x.png", f"{server}/a b.png"):
        with pytest.raises(ImageError, match="cannot be fetched"):
            fetch_image(broken)
    with pytest.raises(ImageError, match="a volume"):
        fetch_image(f"{server}/x.nii.gz")
    with pytest.raises(ImageError, match="not here after 0 s"):
        fetch_image(f"{server}/slow.png", whole_time=0.2)
