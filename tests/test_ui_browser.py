"""The page, driven in a real browser. MEDLEY_SCREENSHOTS names a folder to keep what it saw in."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pydicom
from page_in_browser import (
    DRAW,
    LEFT,
    NEEDS_CHROMIUM,
    RIGHT,
    SCAN,
    Opened,
    browser,
    careful,
    keep,
    long_drawing,
    opened,
    picture,
    running,
    send,
    setting,
    slowly,
    votes,
    wait_answer,
)
from playwright.sync_api import expect
from running_server import Running

from medley.phantoms import Phantom

__all__ = ["browser", "opened", "running", "votes"]  # the fixtures
pytestmark = NEEDS_CHROMIUM
REPORT = "Write an illustrated report of a CT scan of the head with a large marked cyst in the "


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
