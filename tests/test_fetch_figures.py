"""Figures from a server on loopback that drops, lies and stalls; archives that mean harm."""

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

from medley.datasets.figures import catalogue
from medley.datasets.figures.download import FetchError, RetryPolicy, download
from medley.datasets.figures.manifest import Published
from medley.datasets.figures.pmc_archives import Figure, fetch_all, read_figures, take_out
from medley.errors import UserError

QUICK = RetryPolicy(tries=3, pause=0.0, timeout=0.5)


def picture(shade: int) -> bytes:
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
    """Serves `files`; `faults` says what goes wrong with a path: a list, one for each request."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)  # bytes


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked[self.path] += 1
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
                lie = 1 if fault == "wrong range" else 0
                span = f"bytes {start + lie}-{len(data) - 1}/{len(data)}"
                self.send_header("Content-Range", span)
            body = data[start:]
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"v1"')
            self.end_headers()
            if fault in ("drop", "stall"):
                body = body[: len(body) // 2]
            if fault == "garble":
                body = bytes(len(body))
            if fault == "drip":
                try:
                    for place in range(0, len(body), 1000):
                        self.wfile.write(body[place : place + 1000])
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
def test_a_file_comes_whole_whatever_the_server_does(
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
        assert server.sent["/a"] == len(data)  # nothing came twice


def test_another_run_goes_on_where_one_was_stopped(server: Server, tmp_path: Path) -> None:
    data = bytes(range(256)) * 2000
    server.files["/a"], server.faults["/a"] = data, ["drop"]
    with pytest.raises(FetchError, match=r"of 512000 bytes came \(1 tries\)"):
        download(f"{server.address}/a", tmp_path / "a", RetryPolicy(tries=1, timeout=1))
    assert not (tmp_path / "a").exists()
    download(f"{server.address}/a", tmp_path / "a", QUICK)
    assert (tmp_path / "a").read_bytes() == data
    assert server.sent["/a"] == len(data)


def test_bytes_of_another_file_are_not_taken_for_its_beginning(
    server: Server, tmp_path: Path
) -> None:
    server.files |= {"/a": b"a" * 1000, "/b": b"b" * 1000}
    server.faults["/a"] = ["drop"]
    with pytest.raises(FetchError):
        download(f"{server.address}/a", tmp_path / "x", RetryPolicy(tries=1, timeout=1))
    download(f"{server.address}/b", tmp_path / "x", QUICK)
    assert (tmp_path / "x").read_bytes() == b"b" * 1000


@pytest.mark.parametrize(
    ("faults", "message", "asked"),
    [
        (["garble"] * 3, r"SHA-256 is not the expected one \(3 tries\)", 3),
        (["404"], "the server says 404", 1),
        (["500"] * 3, r"500.*\(3 tries\)", 3),
        (["stall"] * 3, r"\(3 tries\)", 3),
    ],
)
def test_a_file_that_cannot_be_had_says_why(
    server: Server, faults: list[str], message: str, asked: int, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 200
    server.files["/a"], server.faults["/a"] = data, list(faults)
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(FetchError, match=message):
        download(f"{server.address}/a", tmp_path / "a", QUICK, None, digest, sleep=lambda s: None)
    assert server.asked["/a"] == asked
    assert not (tmp_path / "a").exists()


def test_what_is_too_large_or_no_web_address_is_not_fetched(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = bytes(2000)
    with pytest.raises(FetchError, match="2000 bytes, the limit is 1000"):
        download(f"{server.address}/a", tmp_path / "a", RetryPolicy(largest=1000))
    with pytest.raises(FetchError, match="not an http or https address"):
        download("file:///etc/passwd", tmp_path / "a", QUICK)


# --- archives -------------------------------------------------------------------------------


def test_only_wanted_regular_files_leave_an_archive(tmp_path: Path) -> None:
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
            info.size = len(picture(1))
            tar.addfile(info, io.BytesIO(picture(1)))
    path, folder = tmp_path / "a.tar.gz", tmp_path / "images"
    path.write_bytes(buffer.getvalue())
    names = ["link", "hard", "fifo", "device", "folder", "good"]
    group = [Figure(f"id_{name}", "x", f"./PMC1/{name}.jpg") for name in names]
    outcomes = {o.identifier: o for o in take_out(path, group, folder)}
    assert outcomes["id_good"].error is None
    assert outcomes["id_good"].sha256 == hashlib.sha256(picture(1)).hexdigest()
    for name in names[:-1]:
        assert "has no file" in str(outcomes[f"id_{name}"].error)
    assert [p.name for p in folder.iterdir()] == ["id_good.jpg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "images"]


def test_headers_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("PMC1/a.jpg")
        info.pax_headers = {"comment": "x" * (3 << 20)}
        info.size = len(picture(1))
        tar.addfile(info, io.BytesIO(picture(1)))
    path = tmp_path / "a.tar.gz"
    path.write_bytes(buffer.getvalue())
    (outcome,) = take_out(path, [Figure("a", "x", "PMC1/a.jpg")], tmp_path)
    assert "broken (a header of" in str(outcome.error)


def test_one_article_that_cannot_be_fetched_costs_no_other(server: Server, tmp_path: Path) -> None:
    server.files["/1.tar.gz"] = archive(PMC1__a_DOT_jpg=picture(1))
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


def test_closing_stops_what_is_under_way(server: Server, tmp_path: Path) -> None:
    server.files |= {"/slow": bytes(10_000_000), "/1.tar.gz": archive(PMC1__a_DOT_jpg=picture(1))}
    server.faults["/slow"] = ["drip"] * 9
    group = [
        Figure("1_a", f"{server.address}/1.tar.gz", "PMC1/a.jpg"),
        Figure("2_a", f"{server.address}/slow", "PMC2/a.jpg"),
    ]
    found = fetch_all(group, tmp_path, tmp_path / "x", 2, False, RetryPolicy(timeout=60))
    assert next(iter(found)).identifier == "1_a"
    begun = time.monotonic()
    found.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begun < 20  # the server would go on for minutes
    with pytest.raises(FetchError, match="slower than"):
        patience = RetryPolicy(tries=1, timeout=0.4, slowest=1e9)
        download(f"{server.address}/slow", tmp_path / "slow", patience)


# --- the program ----------------------------------------------------------------------------


def write_urls(path: Path, server: Server, rows: list[tuple[str, str, str]]) -> None:
    lines = [
        {"pair_id": identifier, "pmc_tar_url": server.address + archive, "image_file_path": member}
        for identifier, archive, member in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(*words: Any) -> int:
    return fetch_figures.main([*map(str, words), "--tries", "2", "--timeout", "0.5"])


def test_articles_are_fetched_once_and_what_is_missing_is_named(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("medley.datasets.figures.download.Patience.pause", 0.0)
    server.files |= {
        "/1.tar.gz": archive(PMC1__a_DOT_jpg=picture(1), PMC1__b_DOT_jpg=picture(2)),
        "/2.tar.gz": archive(PMC2__a_DOT_jpg=b"no picture"),
        "/3.tar.gz": archive(PMC3__a_DOT_jpg=picture(3))[:200],
        "/4.tar.gz": archive(PMC4__a_DOT_jpg=picture(4)),
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
    said = capsys.readouterr()
    assert "7 figures, 0 of them there already; 7 in 5 archives to fetch" in said.out
    assert "nothing was fetched: --allow_network does it" in said.err
    assert not server.asked
    server.faults["/4.tar.gz"] = ["drop"]
    assert run(*words, "--allow_network") == 3
    assert sorted(p.name for p in output.glob("*.jpg")) == ["1_a.jpg", "1_b.jpg", "4_a.jpg"]
    assert (output / "1_b.jpg").read_bytes() == picture(2)
    listed = [json.loads(line) for line in (output / "missing.jsonl").read_text().splitlines()]
    missing = {row["identifier"]: row["error"] for row in listed}
    assert "has no file PMC1/c.jpg" in missing["1_c"]
    assert "no picture" in missing["2_a"]
    assert "broken" in missing["3_a"]
    assert "404" in missing["5_a"]
    assert not (output / "archives").exists()

    server.files["/3.tar.gz"] = archive(PMC3__a_DOT_jpg=picture(3))
    asked = Counter(server.asked)
    (output / "4_a.jpg").write_bytes(b"x" * len(picture(4)))  # the same size, another content
    assert run(*words, "--allow_network", "--verify") == 3
    assert server.asked["/1.tar.gz"] == asked["/1.tar.gz"] + 1  # for the one that is missing
    assert (output / "3_a.jpg").read_bytes() == picture(3)
    assert (output / "4_a.jpg").read_bytes() == picture(4)
    assert run(*words, "--allow_network", "--limit", 2) == 0


def test_data_files_are_checked_against_the_catalogue(
    server: Server, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = b"[1, 2, 3]"
    server.files["/instruct/llava_med_instruct_10k.json"] = data
    monkeypatch.setattr(catalogue, "_HOST", server.address)
    name = "llava_med_instruct_10k.json"
    words = ["--data", name, "--output", tmp_path]
    file = Published(len(data), hashlib.sha256(data).hexdigest(), "instruct")
    monkeypatch.setitem(catalogue.FILES, name, file)
    assert run(*words, "--allow_network") == 0
    assert (tmp_path / name).read_bytes() == data
    assert run(*words, "--allow_network") == 0
    assert "is there, and whole" in capsys.readouterr().out
    assert sum(server.asked.values()) == 1
    monkeypatch.setitem(catalogue.FILES, name, Published(len(data), "0" * 64, "instruct"))
    monkeypatch.setattr("medley.datasets.figures.download.Patience.pause", 0.0)
    assert run(*words, "--allow_network") == 3
    assert "SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pair_id": "../a", "pmc_tar_url": "x", "image_file_path": "y"}, "no name for a file"),
        ({"pair_id": 3, "pmc_tar_url": "x", "image_file_path": "y"}, "must be texts"),
        ({"pair_id": "a"}, "expected pair_id"),
        ([], "expected pair_id"),
    ],
)
def test_bad_lines_are_named(row: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "urls.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message) as error:
        read_figures(path)
    assert "urls.jsonl:1" in str(error.value)
