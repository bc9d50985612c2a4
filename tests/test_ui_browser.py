"""The web UI in a real browser: conversations, images, settings, export and feedback."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pydicom
from playwright.sync_api import expect
from running_server import RunningServer
from ui_in_browser import (
    IMAGE_PROMPT,
    LEFT,
    MESSAGE,
    NEEDS_CHROMIUM,
    RIGHT,
    SCAN,
    OpenPage,
    browser,
    change_setting,
    feedback_dir,
    open_page,
    running,
    scan_file,
    screenshot,
    send,
    set_image_count,
    slow_model,
    start_long_response,
    use_best_settings,
    wait_for_response,
)

from medley.phantoms import Phantom

__all__ = ["browser", "feedback_dir", "open_page", "running"]  # fixtures
pytestmark = NEEDS_CHROMIUM
REPORT = "Write an illustrated report of a CT scan of the head with a large marked cyst in the "
DESCRIBE = "Describe the picture."  # alias
CAPTION = "This is a CT scan of the head"


# --- responses --------------------------------------------------------------------------------


def test_question_about_an_image_and_a_follow_up(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page()
    send(page, "Which organ is shown?", scan_file(tmp_path))
    wait_for_response(page)
    expect(page.locator(f"{LEFT} .bot")).to_contain_text("head")
    expect(page.locator(f"{LEFT} .user img")).to_have_attribute("alt", "Uploaded image")
    expect(page.locator(MESSAGE)).to_have_value("")
    send(page, "What modality is this?")
    expect(page.locator(f"{LEFT} .bot").last).to_contain_text("CT", timeout=60_000)
    screenshot(page, "question")


def test_previews_while_an_image_is_generated(open_page: OpenPage, running: RunningServer) -> None:
    page = open_page()
    use_best_settings(page)
    # Eight images: a slow machine may display the first preview seconds later.
    with slow_model(running, 0.05):
        start_long_response(page)
        note = page.locator("#note-left .status")
        expect(note).to_have_text(re.compile(r"generating an image, \d+%"), timeout=60_000)
        screenshot(page, "preview")
        page.locator("#stop").click()
        assert wait_for_response(page) == "stopped"
    page.locator("#clear").click()
    expect(page.locator(f"{LEFT} .bot")).to_have_count(0)
    set_image_count(page, 1)
    send(page, IMAGE_PROMPT)
    assert "tiny, seed" in wait_for_response(page)
    image = page.locator(f"{LEFT} .bot img")
    expect(image).to_have_count(1)
    expect(image).to_have_attribute("alt", "Generated image")
    screenshot(page, "image")


def test_report_has_text_and_an_image_in_their_order(open_page: OpenPage) -> None:
    page = open_page()
    use_best_settings(page)
    send(page, f"{REPORT}upper left.")
    wait_for_response(page)
    expect(page.locator(f"{LEFT} .bot").locator("img")).to_have_count(1)
    text = page.locator(LEFT).inner_text()
    assert "Technique: CT. Region: head." in text
    assert text.index("Technique") < text.index("Seen")
    screenshot(page, "report")


def test_two_models_respond_side_by_side(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page()
    page.get_by_label("Compare two models").check()
    expect(page.locator(RIGHT)).to_be_visible()
    send(page, DESCRIBE, scan_file(tmp_path))
    assert wait_for_response(page).startswith("tiny, seed")
    assert wait_for_response(page, "right").startswith("second, seed")
    for side in (LEFT, RIGHT):
        expect(page.locator(f"{side} .bot")).to_contain_text(CAPTION)
    screenshot(page, "side-by-side")
    notes = [page.locator(f"#note-{side} .status") for side in ("left", "right")]
    left, right = (note.inner_text() for note in notes)
    page.locator(LEFT).get_by_label("Retry").click()
    expect(notes[0]).not_to_have_text(left)
    assert wait_for_response(page).startswith("tiny, seed")
    assert notes[1].inner_text() == right  # Only the left response was regenerated.


def test_images_replace_placeholders_in_the_text(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page()
    first, second = scan_file(tmp_path), tmp_path / "later.png"
    Phantom("CT", "head", (), 9).image(256).save(second)
    send(page, "Before: <image> After: <image> What has changed?", first, second)
    wait_for_response(page)
    expect(page.locator(f"{LEFT} .user img")).to_have_count(2)
    expect(page.locator(f"{LEFT} .bot")).to_contain_text(re.compile(r"\w{4}"))


def test_dicom_files_can_be_uploaded(open_page: OpenPage, tmp_path: Path) -> None:
    gray = np.asarray(SCAN.image(128).convert("L")).astype(np.uint16) * 16
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
    file.PixelData = gray.tobytes()
    path = tmp_path / "scan.dcm"
    file.save_as(path, enforce_file_format=True)
    page = open_page()
    send(page, "Which organ is shown?", path)
    wait_for_response(page)
    expect(page.locator(f"{LEFT} .bot")).to_contain_text("head")
    expect(page.locator(f"{LEFT} .user img")).to_be_visible()


# --- actions ----------------------------------------------------------------------------------


def test_stop_regenerate_clear_and_settings(open_page: OpenPage, running: RunningServer) -> None:
    page = open_page()
    page.get_by_label("Toggle Sidebar").click()
    page.get_by_label("image", exact=True).check()
    change_setting(page, "Seed", "11")
    set_image_count(page, 6)
    send(page, IMAGE_PROMPT)
    expect(page.locator(f"{LEFT} .bot img").first).to_be_visible(timeout=60_000)
    page.locator("#stop").click()
    assert wait_for_response(page) == "stopped"
    assert running.becomes_idle()
    set_image_count(page, 1)
    page.locator("#regenerate").click()
    expect(page.locator("#note-left .status")).to_contain_text("seed 12", timeout=60_000)
    wait_for_response(page)
    page.locator("#clear").click()
    expect(page.locator(f"{LEFT} .bot")).to_have_count(0)
    send(page, IMAGE_PROMPT)
    assert "seed 11," in wait_for_response(page)


def test_messages_wait_during_a_response_and_clear_ends_it(
    open_page: OpenPage, running: RunningServer
) -> None:
    page = open_page()
    with slow_model(running, 0.02):
        start_long_response(page)
        page.fill(MESSAGE, "And now?")
        page.press(MESSAGE, "Enter")
        expect(page.get_by_text("A response is still being generated").first).to_be_visible()
        expect(page.locator(MESSAGE)).to_have_value("And now?")
        page.locator("#regenerate").click()
        expect(page.locator(f"{LEFT} .bot img").first).to_be_visible()
        page.locator("#clear").click()
        expect(page.locator(f"{LEFT} .bot")).to_have_count(0, timeout=30_000)
        assert running.becomes_idle()
    page.wait_for_timeout(1500)  # No late update may fill the conversation.
    expect(page.locator(f"{LEFT} .bot")).to_have_count(0)
    expect(page.locator(f"{LEFT} .user")).to_have_count(0)
    page.get_by_label("text", exact=True).check()
    change_setting(page, "number input for Minimum images", "0")
    send(page, "Which organ is shown?")
    assert "tokens in" in wait_for_response(page)
    expect(page.locator(f"{LEFT} .user")).to_have_count(1)


def test_stop_keeps_the_partial_responses(open_page: OpenPage, running: RunningServer) -> None:
    page = open_page()
    page.get_by_label("Compare two models").check()
    expect(page.locator(RIGHT)).to_be_visible()
    start_long_response(page)
    expect(page.locator(f"{RIGHT} .bot img").first).to_be_visible(timeout=60_000)
    page.locator("#stop").click()
    for side, chat in (("left", LEFT), ("right", RIGHT)):
        assert wait_for_response(page, side) == "stopped"
        expect(page.locator(f"{chat} .bot img").first).to_be_visible()
    assert running.becomes_idle()
    page.get_by_label("Compare two models").uncheck()
    page.get_by_label("text", exact=True).check()
    change_setting(page, "number input for Minimum images", "0")
    send(page, "Which organ is shown?")
    wait_for_response(page)
    page.get_by_label("Compare two models").check()
    expect(page.locator(f"{RIGHT} .user")).to_have_count(1)  # The hidden panel got no message.


def test_closed_browser_ends_its_request(open_page: OpenPage, running: RunningServer) -> None:
    page = open_page()
    with slow_model(running, 0.05):
        start_long_response(page)
        page.context.close()
        assert running.becomes_idle()


def test_conversation_is_exported_and_feedback_is_saved(
    open_page: OpenPage, feedback_dir: Path, tmp_path: Path
) -> None:
    page = open_page()
    send(page, DESCRIBE, scan_file(tmp_path))
    wait_for_response(page)
    for button, kind in (("#save-json", "json"), ("#save-html", "html")):
        with page.expect_download() as download:
            page.locator(button).click()
        path = tmp_path / f"conversation.{kind}"
        download.value.save_as(path)
        text = path.read_text()
        assert CAPTION in text
        assert "data:image/png;base64," in text
        assert "not for clinical decisions" in text.lower()
    exported = json.loads((tmp_path / "conversation.json").read_text())
    (conversation,) = exported["conversations"]
    assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"]
    page.locator(LEFT).get_by_label("Like", exact=True).last.click()
    deadline = time.monotonic() + 30
    while not list(feedback_dir.glob("*-conv.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (file,) = feedback_dir.glob("*-conv.json")
    row = json.loads(file.read_text().splitlines()[-1])
    assert (row["type"], row["model"]) == ("upvote", "tiny")
    assert row["state"]["messages"][0] == ["user", f"<image>{DESCRIBE}"]
    assert (feedback_dir / row["state"]["images"][0]).is_file()
    page.locator(LEFT).get_by_label("Liked", exact=True).last.click()  # withdraws the feedback
    page.locator("#clear").click()
    expect(page.locator(f"{LEFT} .bot")).to_have_count(0)
    assert len(file.read_text().splitlines()) == 1


def test_examples_fill_the_message_box(open_page: OpenPage) -> None:
    page = open_page()
    page.get_by_text("Where is the cyst?").click()
    expect(page.locator(MESSAGE)).to_have_value("Where is the cyst?")
    page.press(MESSAGE, "Enter")
    wait_for_response(page)
    expect(page.locator(f"{LEFT} .bot")).to_contain_text("upper left")
