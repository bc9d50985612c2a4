"""Figures from a loopback server that drops, stalls and corrupts; malicious archives."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conversion import fetch_figures
from PIL import Image

from medley.commands.fetch_figures import FetchFiguresOptions
from medley.datasets.figures import manifest
from medley.datasets.figures.download import FetchError, RetryPolicy, download
from medley.datasets.figures.manifest import PublishedFile
from medley.datasets.figures.pmc_archives import Figure, extract, fetch_all, read_figures
from medley.errors import UserError
from medley.utils.temporary_files import exclusive

QUICK = RetryPolicy(max_retries=2, pause=0.0, timeout=0.5)


def image_bytes(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), (shade, 0, 0)).save(buffer, "jpeg")
    return buffer.getvalue()


def archive(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name.replace("__", "/").replace("_DOT_", "."))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@dataclass
class Server:
    """Serves `files`; `faults` lists, for a path, the fault of each request in order."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)  # bytes


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests[self.path] += 1
            faults = state.faults.get(self.path, [])
            fault = faults.pop(0) if faults else ""
            if fault.isdigit():
                self.send_error(int(fault))
                return
            data = state.files.get(self.path)
            if data is None:
                self.send_error(404)
                return
            start = 0
            wanted = self.headers.get("Range")
            if wanted and self.headers.get("If-Range") == '"v1"' and fault != "no ranges":
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206 if start else 200)
            if start:
                shift = 1 if fault == "wrong range" else 0
                span = f"bytes {start + shift}-{len(data) - 1}/{len(data)}"
                self.send_header("Content-Range", span)
            body = data[start:]
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"v1"')
            self.end_headers()
            if fault in ("drop", "stall"):
                body = body[: len(body) // 2]
            if fault == "corrupt":
                body = bytes(len(body))
            if fault == "drip":
                try:
                    for start in range(0, len(body), 1000):
                        self.wfile.write(body[start : start + 1000])
                        self.wfile.flush()
                        time.sleep(0.05)
                except OSError:
                    pass
                return
            self.wfile.write(body)
            state.sent[self.path] += len(body)
            if fault == "stall":
                self.wfile.flush()
                time.sleep(1.5)
            if fault in ("drop", "stall"):
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        state.address = f"http://127.0.0.1:{running.server_port}"
        yield state
        running.shutdown()


# --- one file -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [[], ["drop"], ["drop", "drop"], ["500"], ["429", "drop"], ["stall"], ["drop", "wrong range"],
     ["drop", "no ranges"]],
)  # fmt: skip
def test_download_completes_despite_server_faults(
    server: Server, faults: list[str], tmp_path: Path
) -> None:
    data = bytes(range(256)) * 2000
    server.files["/a"], server.faults["/a"] = data, list(faults)
    digest = hashlib.sha256(data).hexdigest()
    pauses: list[float] = []
    download(f"{server.address}/a", tmp_path / "a", QUICK, len(data), digest, sleep=pauses.append)
    assert (tmp_path / "a").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert len(pauses) == len([fault for fault in faults if fault != "no ranges"])
    if faults == ["drop"]:
        assert server.sent["/a"] == len(data)  # no byte was sent twice


def test_next_run_resumes_an_interrupted_download(server: Server, tmp_path: Path) -> None:
    data = bytes(range(256)) * 2000
    server.files["/a"], server.faults["/a"] = data, ["drop"]
    with pytest.raises(FetchError, match=r"of 512000 bytes \(1 attempts\)"):
        download(f"{server.address}/a", tmp_path / "a", RetryPolicy(max_retries=0, timeout=1))
    assert not (tmp_path / "a").exists()
    download(f"{server.address}/a", tmp_path / "a", QUICK)
    assert (tmp_path / "a").read_bytes() == data
    assert server.sent["/a"] == len(data)


def test_two_runs_that_download_the_same_file_do_not_mix(server: Server, tmp_path: Path) -> None:
    data = bytes(range(256)) * 2000
    server.files["/a"], part = data, tmp_path / ".a.part"
    part.write_bytes(b"of the other run")
    with exclusive(tmp_path / ".a.part.lock") as other:
        assert other
        download(f"{server.address}/a", tmp_path / "a", QUICK)
    assert (tmp_path / "a").read_bytes() == data and part.read_bytes() == b"of the other run"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.part", "a"]


def test_partial_download_of_another_url_is_discarded(server: Server, tmp_path: Path) -> None:
    server.files |= {"/a": b"a" * 1000, "/b": b"b" * 1000}
    server.faults["/a"] = ["drop"]
    with pytest.raises(FetchError):
        download(f"{server.address}/a", tmp_path / "x", RetryPolicy(max_retries=0, timeout=1))
    download(f"{server.address}/b", tmp_path / "x", QUICK)
    assert (tmp_path / "x").read_bytes() == b"b" * 1000


@pytest.mark.parametrize(
    ("faults", "message", "requests"),
    [
        (["corrupt"] * 3, r"the SHA-256 differs from the expected one \(3 attempts\)", 3),
        (["404"], "The server returned 404", 1),
        (["500"] * 3, r"500.*\(3 attempts\)", 3),
        (["stall"] * 3, r"\(3 attempts\)", 3),
    ],
)
def test_failed_download_reports_the_reason(
    server: Server, faults: list[str], message: str, requests: int, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 200
    server.files["/a"], server.faults["/a"] = data, list(faults)
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(FetchError, match=message):
        download(f"{server.address}/a", tmp_path / "a", QUICK, None, digest, sleep=lambda s: None)
    assert server.requests["/a"] == requests
    assert not (tmp_path / "a").exists()


def test_oversized_files_and_local_urls_are_rejected(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = bytes(2000)
    with pytest.raises(FetchError, match=r"2000 bytes \(limit 1000\)"):
        download(f"{server.address}/a", tmp_path / "a", RetryPolicy(max_bytes=1000))
    with pytest.raises(FetchError, match="Not an http or https URL"):
        download("file:///etc/passwd", tmp_path / "a", QUICK)


# --- archives -------------------------------------------------------------------------------


def test_extracts_only_requested_regular_files(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for kind, name in (
            (tarfile.SYMTYPE, "PMC1/link.jpg"), (tarfile.LNKTYPE, "PMC1/hard.jpg"),
            (tarfile.FIFOTYPE, "PMC1/fifo.jpg"), (tarfile.CHRTYPE, "PMC1/device.jpg"),
            (tarfile.DIRTYPE, "PMC1/folder.jpg"),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("../../out.jpg", "/abs.jpg", "PMC1/good.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(image_bytes(1))
            tar.addfile(info, io.BytesIO(image_bytes(1)))
    path, folder = tmp_path / "a.tar.gz", tmp_path / "images"
    path.write_bytes(buffer.getvalue())
    names = ["link", "hard", "fifo", "device", "folder", "good"]
    group = [Figure(f"id_{name}", "x", f"./PMC1/{name}.jpg") for name in names]
    outcomes = {o.identifier: o for o in extract(path, group, folder)}
    assert outcomes["id_good"].error is None
    assert outcomes["id_good"].sha256 == hashlib.sha256(image_bytes(1)).hexdigest()
    for name in names[:-1]:
        assert "has no file" in str(outcomes[f"id_{name}"].error)
    assert [p.name for p in folder.iterdir()] == ["id_good.jpg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "images"]


def test_oversized_tar_headers_are_rejected(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("PMC1/a.jpg")
        info.pax_headers = {"comment": "x" * (3 << 20)}
        info.size = len(image_bytes(1))
        tar.addfile(info, io.BytesIO(image_bytes(1)))
    path = tmp_path / "a.tar.gz"
    path.write_bytes(buffer.getvalue())
    (outcome,) = extract(path, [Figure("a", "x", "PMC1/a.jpg")], tmp_path)
    assert "damaged (a header of" in str(outcome.error)


def test_failed_article_does_not_affect_others(server: Server, tmp_path: Path) -> None:
    server.files["/1.tar.gz"] = archive(PMC1__a_DOT_jpg=image_bytes(1))
    group = [
        Figure("1_a", f"{server.address}/1.tar.gz", "PMC1/a.jpg"),
        Figure("2_a", "http://[::1", "PMC2/a.jpg"),
        Figure("3_a", f"{server.address}/gr\u00f6\u00dfe.tar.gz", "PMC3/a.jpg"),
        Figure("4_a", f"{server.address}/\ud800.tar.gz", "PMC4/a.jpg"),
    ]
    found = {o.identifier: o for o in fetch_all(group, tmp_path, tmp_path / "x", 2, False, QUICK)}
    assert found["1_a"].error is None
    assert all(found[name].error for name in ("2_a", "3_a", "4_a"))
    assert "404" in str(found["3_a"].error)


def test_closing_cancels_running_downloads(server: Server, tmp_path: Path) -> None:
    server.files |= {
        "/slow": bytes(10_000_000),
        "/1.tar.gz": archive(PMC1__a_DOT_jpg=image_bytes(1)),
    }
    server.faults["/slow"] = ["drip"] * 9
    group = [
        Figure("1_a", f"{server.address}/1.tar.gz", "PMC1/a.jpg"),
        Figure("2_a", f"{server.address}/slow", "PMC2/a.jpg"),
    ]
    outcomes = fetch_all(group, tmp_path, tmp_path / "x", 2, False, RetryPolicy(timeout=60))
    assert next(outcomes).identifier == "1_a"
    begun = time.monotonic()
    outcomes.close()
    assert time.monotonic() - begun < 20  # the server would send for minutes
    with pytest.raises(FetchError, match="slower than"):
        policy = RetryPolicy(max_retries=0, timeout=0.4, min_rate=1e9)
        download(f"{server.address}/slow", tmp_path / "slow", policy)


# --- the command ----------------------------------------------------------------------------


def write_urls(path: Path, server: Server, rows: list[tuple[str, str, str]]) -> None:
    lines = [
        {"pair_id": identifier, "pmc_tar_url": server.address + archive, "image_file_path": member}
        for identifier, archive, member in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(*words: Any) -> int:
    return fetch_figures.main([*map(str, words), "--max_retries", "1", "--timeout", "0.5"])


def test_figures_are_fetched_once_and_failures_are_listed(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(FetchFiguresOptions, "policy", QUICK)
    server.files |= {
        "/1.tar.gz": archive(PMC1__a_DOT_jpg=image_bytes(1), PMC1__b_DOT_jpg=image_bytes(2)),
        "/2.tar.gz": archive(PMC2__a_DOT_jpg=b"not an image"),
        "/3.tar.gz": archive(PMC3__a_DOT_jpg=image_bytes(3))[:200],
        "/4.tar.gz": archive(PMC4__a_DOT_jpg=image_bytes(4)),
    }
    urls, output = tmp_path / "urls.jsonl", tmp_path / "out"
    write_urls(urls, server, [
        ("1_a", "/1.tar.gz", "PMC1/a.jpg"), ("1_b", "/1.tar.gz", "PMC1/b.jpg"),
        ("1_c", "/1.tar.gz", "PMC1/c.jpg"), ("2_a", "/2.tar.gz", "PMC2/a.jpg"),
        ("3_a", "/3.tar.gz", "PMC3/a.jpg"), ("4_a", "/4.tar.gz", "PMC4/a.jpg"),
        ("5_a", "/5.tar.gz", "PMC5/a.jpg"),
    ])  # fmt: skip
    words = ["--input", urls, "--output", output]
    assert run(*words) == 2
    printed = capsys.readouterr()
    assert "7 figures, 0 exist; 7 in 5 archives to fetch" in printed.out
    assert "Nothing was fetched. Add --allow_network" in printed.err
    assert not server.requests
    server.faults["/4.tar.gz"] = ["drop"]
    assert run(*words, "--allow_network") == 3
    assert sorted(p.name for p in output.glob("*.jpg")) == ["1_a.jpg", "1_b.jpg", "4_a.jpg"]
    assert (output / "1_b.jpg").read_bytes() == image_bytes(2)
    listed = [json.loads(line) for line in (output / "missing.jsonl").read_text().splitlines()]
    missing = {row["identifier"]: row["error"] for row in listed}
    assert "has no file PMC1/c.jpg" in missing["1_c"]
    assert "not an image in a supported format" in missing["2_a"]
    assert "damaged" in missing["3_a"]
    assert "404" in missing["5_a"]
    assert not (output / "archives").exists()

    server.files["/3.tar.gz"] = archive(PMC3__a_DOT_jpg=image_bytes(3))
    before = Counter(server.requests)
    (output / "4_a.jpg").write_bytes(b"x" * len(image_bytes(4)))  # same size, other content
    assert run(*words, "--allow_network", "--verify") == 3
    assert server.requests["/1.tar.gz"] == before["/1.tar.gz"] + 1  # for the missing one
    assert (output / "3_a.jpg").read_bytes() == image_bytes(3)
    assert (output / "4_a.jpg").read_bytes() == image_bytes(4)
    assert run(*words, "--allow_network", "--limit", 2) == 0


def test_data_files_are_verified_against_the_manifest(
    server: Server, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = b"[1, 2, 3]"
    server.files["/instruct/llava_med_instruct_10k.json"] = data
    monkeypatch.setattr(manifest, "_HOST", server.address)
    name = "llava_med_instruct_10k.json"
    words = ["--data", name, "--output", tmp_path]
    file = PublishedFile(len(data), hashlib.sha256(data).hexdigest(), "instruct")
    monkeypatch.setitem(manifest.FILES, name, file)
    assert run(*words, "--allow_network") == 0
    assert (tmp_path / name).read_bytes() == data
    assert run(*words, "--allow_network") == 0
    assert "exists, checksum verified" in capsys.readouterr().out
    assert sum(server.requests.values()) == 1
    monkeypatch.setitem(manifest.FILES, name, PublishedFile(len(data), "0" * 64, "instruct"))
    monkeypatch.setattr(FetchFiguresOptions, "policy", QUICK)
    assert run(*words, "--allow_network") == 3
    assert "SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pair_id": "../a", "pmc_tar_url": "x", "image_file_path": "y"}, "not a valid file name"),
        ({"pair_id": 3, "pmc_tar_url": "x", "image_file_path": "y"}, "must be strings"),
        ({"pair_id": "a"}, "Expected an object with pair_id"),
        ([], "Expected an object with pair_id"),
    ],
)
def test_invalid_lines_raise_with_line_number(row: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "urls.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message) as error:
        read_figures(path)
    assert "urls.jsonl:1" in str(error.value)
