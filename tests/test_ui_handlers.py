"""What happens on the page, without a browser: who may write a talk, and when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from filelock import FileLock
from gradio.route_utils import delete_files_created_by_app
from PIL import Image
from running_server import Running
from test_page import SETTING, files

from medley.serving.limits import Limits
from medley.serving.ui.conversation import Conversation
from medley.serving.ui.handlers import SKIP, Handlers, SessionState
from medley.serving.ui.image_store import KEPT, ImageStore, private_folder
from medley.serving.ui.layout import Page

QUESTION = {"text": "Which organ is shown?", "files": []}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = Running(Limits(seconds=60))
    yield found
    found.stop()


@pytest.fixture
def acts(running: Running, tmp_path: Path) -> Handlers:
    return Handlers(running.state, ImageStore(tmp_path / "gallery"), None)


def taken(
    acts: Handlers, talk: Conversation, message: dict[str, Any] = QUESTION, chat: Any = ()
) -> Any:
    return acts.take(message, False, SessionState(), talk, list(chat), Conversation(), [])


async def answered(acts: Handlers, talk: Conversation) -> list[Any]:
    return [shown async for shown in acts.answer("tiny", talk, True, *SETTING.values())]


def test_a_question_has_one_answer_however_often_it_is_asked_for(acts: Handlers) -> None:
    async def twice() -> list[list[Any]]:
        _, talk, *_ = await taken(acts, Conversation())
        return await asyncio.gather(answered(acts, talk), answered(acts, talk.again()))

    one, other = asyncio.run(twice())
    assert one[-1][0].said[-1].standing == ""
    assert other == [SKIP * 3]


def test_what_is_cleared_while_it_is_read_does_not_come_back(
    acts: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = acts.gallery.sent
    monkeypatch.setattr(acts.gallery, "sent", lambda *a: (time.sleep(0.5), sent(*a))[1])
    message = {"text": "Why?", "files": files(tmp_path, "red")}
    desk = SessionState()

    async def both() -> Any:
        reading = asyncio.ensure_future(
            acts.take(message, False, desk, Conversation(), [], Conversation(), [])
        )
        await asyncio.sleep(0.1)
        with pytest.warns(UserWarning, match="still being read"):
            assert acts.again(desk, Conversation(), []) == SKIP * 3
        await acts.clear(desk, Conversation())
        return await reading

    assert asyncio.run(both()) == SKIP * 7
    assert not desk.reading


def test_clear_waits_for_an_answers_last_word(acts: Handlers) -> None:
    async def cleared() -> tuple[list[Any], Any]:
        _, talk, *_ = await taken(acts, Conversation())
        answer = acts.answer("tiny", talk, True, *SETTING.values())
        under_way, *_ = await anext(answer)
        assert under_way.under_way
        clearing = asyncio.ensure_future(acts.clear(SessionState(), under_way))
        await asyncio.sleep(0.05)
        assert not clearing.done()
        return [shown async for shown in answer], await clearing

    last, empty = asyncio.run(cleared())
    assert all(shown == SKIP * 3 for shown in last)
    assert empty[0] == Conversation()


def test_a_talk_that_the_server_has_forgotten_is_not_asked_without_it(acts: Handlers) -> None:
    with pytest.warns(UserWarning, match="has forgotten this talk"):
        assert asyncio.run(taken(acts, Conversation(), chat=[{"role": "user"}])) == SKIP * 7


def test_nothing_is_taken_from_the_box_while_the_server_closes(
    acts: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acts.state, "draining", True)
    with pytest.warns(UserWarning, match="shutting down"):
        assert asyncio.run(taken(acts, Conversation())) == SKIP * 7


def test_a_picture_of_three_hours_ago_outlives_gradios_own_cleaning(running: Running) -> None:
    async def built() -> tuple[Page, gr.Blocks]:
        page = Page(running.state)
        return page, page.build()

    page, blocks = asyncio.run(built())
    kept = page.acts.gallery.drawn(Image.new("RGB", (8, 8), "red"))
    blocks.temp_file_sets[0].add(str(kept.file))
    assert blocks.delete_cache is not None
    _, age = blocks.delete_cache
    assert age >= KEPT
    delete_files_created_by_app(blocks, age)
    assert kept.file.exists()


def test_what_a_killed_process_left_goes_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead, living = tmp_path / "medley-page-dead", tmp_path / "medley-page-living"
    for folder in (dead, living):
        folder.mkdir()
        (folder / "picture.png").write_bytes(b"x")
    with FileLock(living / ".lock"):
        own = private_folder.__wrapped__()
    assert not dead.exists()
    assert (living / "picture.png").exists()
    assert own.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in own.iterdir()] == [".lock"]
