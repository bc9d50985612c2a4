"""The page, driven in a real browser. MEDLEY_SCREENSHOTS names a folder to keep what it saw in."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
import pytest
from page_in_browser import (
    DRAW,
    LEFT,
    NEEDS_CHROMIUM,
    RIGHT,
    browser,
    keep,
    long_drawing,
    send,
    setting,
    slowly,
    wait_answer,
)
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from running_server import Running

from medley.phantoms import Phantom
from medley.phantoms.world import Finding
from medley.serving.limits import Limits
from medley.serving.page.mount import add_page

__all__ = ["browser"]  # the fixture
pytestmark = NEEDS_CHROMIUM
REPORT = "Write an illustrated report of a CT scan of the head with a large marked cyst in the "
SCAN = Phantom("CT", "head", (Finding("cyst", "large", "left", "upper"),), 5)


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("votes")


@pytest.fixture(scope="module")
def running(votes: Path) -> Iterator[Running]:
    found = Running(
        Limits(seconds=60, pixels=1_000_000), names=("tiny", "second"),
        change=lambda app, state: add_page(app, state, votes) and None,
    )  # fmt: skip
    yield found
    assert found.idle()
    found.stop()


Opened = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, running: Running) -> Iterator[Opened]:
    """Opens the page; at the end nothing has been asked of another host, and no script failed."""
    contexts, elsewhere, faults = [], [], []

    def watch(page: Page) -> None:
        def request(made: Any) -> None:
            local = re.match(r"(data|blob):|https?://(127\.0\.0\.1|localhost)[:/]", made.url)
            if local is None:
                elsewhere.append(made.url)

        page.on("request", request)
        page.on("pageerror", lambda error: faults.append(str(error)))

    def open_page(address: str = running.address, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        watch(page)
        page.goto(address)
        expect(page.locator("#box textarea")).to_be_visible(timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert elsewhere == []
    assert faults == []


def picture(folder: Path, scan: Phantom = SCAN) -> Path:
    path = folder / "scan.png"
    scan.image(256).save(path)
    return path


# --- talks ------------------------------------------------------------------------------------


def test_a_question_about_a_picture_and_one_that_goes_on(opened: Opened, tmp_path: Path) -> None:
    page = opened()
    send(page, "Which organ is shown?", picture(tmp_path))
    wait_answer(page)
    expect(page.locator(f"{LEFT} .bot")).to_contain_text("head")
    expect(page.locator(f"{LEFT} .user img")).to_have_attribute("alt", "Picture that you sent")
    expect(page.locator("#box textarea")).to_have_value("")
    send(page, "What modality is this?")
    expect(page.locator(f"{LEFT} .bot").last).to_contain_text("CT", timeout=60_000)
    keep(page, "question")


def test_a_picture_grows_while_it_is_drawn(opened: Opened, running: Running) -> None:
    page = opened()
    careful(page)
    # Eight pictures: a fresh browser on a slow machine may take seconds to show the first.
    with slowly(running, 0.05):
        long_drawing(page)
        line = page.locator("#line-left .status")
        expect(line).to_have_text(re.compile(r"drawing, \d+ %"), timeout=60_000)
        keep(page, "growing")
        page.locator("#stop").click()
        assert wait_answer(page) == "stopped"
    page.locator("#clear").click()
    expect(page.locator(f"{LEFT} .bot")).to_have_count(0)
    for which in ("least", "most"):
        setting(page, f"number input for Pictures, at {which}", "1")
    send(page, DRAW)
    assert "tiny, seed" in wait_answer(page)
    drawn = page.locator(f"{LEFT} .bot img")
    expect(drawn).to_have_count(1)
    expect(drawn).to_have_attribute("alt", "Picture drawn by the model")
    keep(page, "picture")


def careful(page: Page) -> None:
    """The settings with which the embedded model draws best (docs/log.md)."""
    setting(page, "number input for Guidance by words", "2")
    setting(page, "number input for Temperature of pictures", "0.4")


def test_a_report_has_words_and_a_picture_in_their_order(opened: Opened) -> None:
    page = opened()
    careful(page)
    send(page, f"{REPORT}upper left.")
    wait_answer(page)
    shown = page.locator(f"{LEFT} .bot")
    expect(shown.locator("img")).to_have_count(1)
    text = page.locator(LEFT).inner_text()
    assert "Technique: CT. Region: head." in text
    assert text.index("Technique") < text.index("Seen")
    keep(page, "report")


def test_two_models_answer_side_by_side(opened: Opened, tmp_path: Path) -> None:
    page = opened()
    page.get_by_label("Two models side by side").check()
    expect(page.locator(RIGHT)).to_be_visible()
    send(page, "Describe the picture.", picture(tmp_path))
    assert wait_answer(page).startswith("tiny, seed")
    assert wait_answer(page, "right").startswith("second, seed")
    for side in (LEFT, RIGHT):
        expect(page.locator(f"{side} .bot")).to_contain_text("This is a CT scan of the head")
    keep(page, "two")
    lines = [page.locator(f"#line-{side} .status") for side in ("left", "right")]
    left, right = (line.inner_text() for line in lines)
    page.locator(LEFT).get_by_label("Retry").click()
    expect(lines[0]).not_to_have_text(left)
    assert wait_answer(page).startswith("tiny, seed")
    assert lines[1].inner_text() == right  # its answer was not asked for anew


def test_pictures_stand_where_the_text_says(opened: Opened, tmp_path: Path) -> None:
    page = opened()
    first, second = picture(tmp_path), tmp_path / "later.png"
    Phantom("CT", "head", (), 9).image(256).save(second)
    send(page, "Before: <image> After: <image> What has changed?", first, second)
    wait_answer(page)
    expect(page.locator(f"{LEFT} .user img")).to_have_count(2)
    expect(page.locator(f"{LEFT} .bot")).to_contain_text(re.compile(r"\w{4}"))


def test_dicom_is_dropped_in_like_any_picture(opened: Opened, tmp_path: Path) -> None:
    grey = np.asarray(SCAN.image(128).convert("L")).astype(np.uint16) * 16
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    file.SOPClassUID, file.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, "1.2.3"
    file.Rows, file.Columns, file.SamplesPerPixel = 128, 128, 1
    file.PhotometricInterpretation = "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    file.WindowCenter, file.WindowWidth = 2048, 4096
    file.PixelData = grey.tobytes()
    path = tmp_path / "scan.dcm"
    file.save_as(path, enforce_file_format=True)
    page = opened()
    send(page, "Which organ is shown?", path)
    wait_answer(page)
    expect(page.locator(f"{LEFT} .bot")).to_contain_text("head")
    expect(page.locator(f"{LEFT} .user img")).to_be_visible()


# --- what can be done with a talk -------------------------------------------------------------


def test_stop_regenerate_clear_and_settings(opened: Opened, running: Running) -> None:
    page = opened()
    page.get_by_label("Toggle Sidebar").click()
    page.get_by_label("image", exact=True).check()
    setting(page, "Seed", "11")
    setting(page, "number input for Pictures, at least", "6")
    setting(page, "number input for Pictures, at most", "6")
    send(page, DRAW)
    expect(page.locator(f"{LEFT} .bot img").first).to_be_visible(timeout=60_000)
    page.locator("#stop").click()
    assert wait_answer(page) == "stopped"
    assert running.idle()
    setting(page, "number input for Pictures, at least", "1")
    setting(page, "number input for Pictures, at most", "1")
    page.locator("#again").click()
    expect(page.locator("#line-left .status")).to_contain_text("seed 12", timeout=60_000)
    wait_answer(page)
    page.locator("#clear").click()
    expect(page.locator(f"{LEFT} .bot")).to_have_count(0)
    send(page, DRAW)
    assert "seed 11," in wait_answer(page)


def test_what_comes_during_an_answer_waits_and_clear_ends_it(
    opened: Opened, running: Running
) -> None:
    page = opened()
    with slowly(running, 0.02):
        long_drawing(page)
        page.fill("#box textarea", "And now?")
        page.press("#box textarea", "Enter")
        expect(page.get_by_text("An answer is still being written").first).to_be_visible()
        expect(page.locator("#box textarea")).to_have_value("And now?")
        page.locator("#again").click()
        expect(page.locator(f"{LEFT} .bot img").first).to_be_visible()
        page.locator("#clear").click()
        expect(page.locator(f"{LEFT} .bot")).to_have_count(0, timeout=30_000)
        assert running.idle()
    page.wait_for_timeout(1500)  # nothing comes back
    expect(page.locator(f"{LEFT} .bot")).to_have_count(0)
    expect(page.locator(f"{LEFT} .user")).to_have_count(0)
    page.get_by_label("text", exact=True).check()
    setting(page, "number input for Pictures, at least", "0")
    send(page, "Which organ is shown?")
    assert "tokens in" in wait_answer(page)
    expect(page.locator(f"{LEFT} .user")).to_have_count(1)


def test_stop_keeps_what_both_sides_have(opened: Opened, running: Running) -> None:
    page = opened()
    page.get_by_label("Two models side by side").check()
    expect(page.locator(RIGHT)).to_be_visible()
    long_drawing(page)
    expect(page.locator(f"{RIGHT} .bot img").first).to_be_visible(timeout=60_000)
    page.locator("#stop").click()
    for side, shown in (("left", LEFT), ("right", RIGHT)):
        assert wait_answer(page, side) == "stopped"
        expect(page.locator(f"{shown} .bot img").first).to_be_visible()
    assert running.idle()
    page.get_by_label("Two models side by side").uncheck()
    page.get_by_label("text", exact=True).check()
    setting(page, "number input for Pictures, at least", "0")
    send(page, "Which organ is shown?")
    wait_answer(page)
    page.get_by_label("Two models side by side").check()
    expect(page.locator(f"{RIGHT} .user")).to_have_count(1)  # was not asked while it was hidden


def test_a_browser_that_goes_frees_its_row(opened: Opened, running: Running) -> None:
    page = opened()
    with slowly(running, 0.05):
        long_drawing(page)
        page.context.close()
        assert running.idle()


def test_a_talk_is_saved_and_voted_on(opened: Opened, votes: Path, tmp_path: Path) -> None:
    page = opened()
    send(page, "Describe the picture.", picture(tmp_path))
    wait_answer(page)
    for button, kind in (("#save-json", "json"), ("#save-html", "html")):
        with page.expect_download() as coming:
            page.locator(button).click()
        path = tmp_path / f"talk.{kind}"
        coming.value.save_as(path)
        text = path.read_text()
        assert "This is a CT scan of the head" in text
        assert "data:image/png;base64," in text
        assert "Not for clinical decisions" in text
    (talk,) = json.loads((tmp_path / "talk.json").read_text())["talks"]
    assert [row["role"] for row in talk["messages"]] == ["user", "assistant"]
    page.locator(LEFT).get_by_label("Like", exact=True).last.click()
    until = time.monotonic() + 30
    while not list(votes.glob("*-conv.json")) and time.monotonic() < until:
        time.sleep(0.05)
    (file,) = votes.glob("*-conv.json")
    row = json.loads(file.read_text().splitlines()[-1])
    assert (row["type"], row["model"]) == ("upvote", "tiny")
    assert row["state"]["messages"][0] == ["user", "<image>Describe the picture."]
    assert (votes / row["state"]["images"][0]).is_file()
    page.locator(LEFT).get_by_label("Liked", exact=True).last.click()  # taken back
    page.locator("#clear").click()
    expect(page.locator(f"{LEFT} .bot")).to_have_count(0)
    assert len(file.read_text().splitlines()) == 1


def test_examples_fill_the_box(opened: Opened) -> None:
    page = opened()
    page.get_by_text("Where is the cyst?").click()
    expect(page.locator("#box textarea")).to_have_value("Where is the cyst?")
    page.press("#box textarea", "Enter")
    wait_answer(page)
    expect(page.locator(f"{LEFT} .bot")).to_contain_text("upper left")


# --- what goes wrong --------------------------------------------------------------------------


def test_what_cannot_be_sent_stays_in_the_box_with_the_reason(
    opened: Opened, tmp_path: Path
) -> None:
    page = opened()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture at all")
    send(page, "What is this?", broken)
    expect(page.get_by_text("not a picture in a format that is known")).to_be_visible()
    expect(page.locator("#box textarea")).to_have_value("What is this?")
    page.wait_for_timeout(1000)  # until it has moved to its place
    keep(page, "error")
    page = opened()
    large = tmp_path / "large.png"
    Image.new("L", (2000, 2000)).save(large)
    send(page, "What is this?", large)
    expect(page.get_by_text("4000000 pixels, the limit is 1000000")).to_be_visible()


def test_an_answer_that_fails_says_why_and_can_be_asked_again(
    opened: Opened, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = opened()
    with monkeypatch.context() as patched:
        patched.setattr(running.model.engine, "step", lambda: 1 / 0)
        send(page, "Which organ is shown?")
        assert "Not answered: ZeroDivisionError inside of the server" in wait_answer(page)
        expect(page.locator(f"{LEFT} .bot")).to_contain_text("Not answered")
    page.locator("#again").click()
    expect(page.locator("#line-left .status")).to_contain_text("tokens in", timeout=60_000)


def test_a_phone_shows_all_of_it(opened: Opened) -> None:
    page = opened(color_scheme="dark")
    careful(page)
    page.set_viewport_size({"width": 360, "height": 740})
    send(page, DRAW)
    wait_answer(page)
    wide = page.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")
    assert wide <= 0
    keep(page, "phone", full_page=True)


def test_everything_has_a_name_and_the_keyboard_reaches_it(opened: Opened) -> None:
    page = opened()
    page.wait_for_function(
        """() => [...document.querySelectorAll("button, input:not([type=file]), textarea, select")]
           .filter(e => e.offsetParent && !(e.ariaLabel || e.title || e.innerText.trim()
               || e.getAttribute("aria-labelledby") || (e.labels && e.labels.length)))
           .length === 0"""
    )
    page.locator("#box textarea").focus()
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel")
        )
    for name in ("Stop", "Regenerate", "Clear", "Save as HTML", "Save as JSON"):
        assert name in reached
    assert page.evaluate("document.documentElement.lang") == "en"


def test_nothing_but_what_was_sent_is_read_or_fetched(
    opened: Opened, running: Running, tmp_path: Path
) -> None:
    """Requests made by hand: a file of this machine, and an address, in the place of a picture."""
    page = opened()
    secret = picture(tmp_path)
    config = httpx.get(f"{running.address}/config").json()
    (take,) = [d for d in config["dependencies"] if d["targets"][0][1] == "submit"]
    (offered,) = [c["id"] for c in config["components"] if c["type"] == "dataset"]
    load = next(d for d in config["dependencies"] if d["targets"][0][0] == offered)

    def done(dependency: Any, data: list[Any]) -> Any:
        body = {"data": data, "fn_index": dependency["id"], "session_hash": "mine"}
        assert httpx.post(f"{running.address}/gradio_api/queue/join", json=body).status_code == 200
        with httpx.stream(
            "GET", f"{running.address}/gradio_api/queue/data?session_hash=mine", timeout=60
        ) as told:
            lines = [json.loads(line[6:]) for line in told.iter_lines() if line.startswith("data")]
        (ended,) = [line for line in lines if line["msg"] == "process_completed"]
        return ended

    def taken(path: str) -> Any:
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        message = {"text": "x", "files": [file]}
        return done(take, [message, False, None, None, [], None, []])

    with secret.open("rb") as content:
        sent = httpx.post(f"{running.address}/gradio_api/upload", files={"files": content})
    for _ in range(2):  # the second time, of a session in which an example was chosen
        for path in (str(secret), "/etc/hostname", f"{running.address}/health",
                     "https://example.com/scan.png"):  # fmt: skip
            assert taken(path)["success"] is False, path
        assert done(load, [0])["success"] is True
    assert taken(sent.json()[0])["success"] is True  # so it was the files that were refused
    for path in (
        f"file={secret}", "file=/etc/hostname", f"file={running.address}/health", "openapi.json",
        "deep_link?session_hash=mine", "proxy=http://127.0.0.1", "process_recording", "runs",
    ):  # fmt: skip
        assert httpx.get(f"{running.address}/gradio_api/{path}").status_code in (403, 404), path
    assert httpx.get(f"{running.address}/config?deep_link=x").status_code == 404
    expect(page.locator(f"{LEFT} .bot")).to_have_count(0)
