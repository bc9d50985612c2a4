"""Event handlers of the web UI without a browser: concurrent events, and the private folder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from filelock import FileLock
from gradio.route_utils import delete_files_created_by_app
from PIL import Image
from running_server import RunningServer
from test_ui import SETTING_VALUES, image_files

from medley.serving.limits import Limits
from medley.serving.ui.conversation import Conversation
from medley.serving.ui.handlers import UNCHANGED, Handlers, SessionState
from medley.serving.ui.image_store import RETENTION_SECONDS, ImageStore, private_folder
from medley.serving.ui.layout import WebUI

QUESTION = {"text": "Which organ is shown?", "files": []}


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    server = RunningServer(Limits(request_timeout=60))
    yield server
    server.stop()


@pytest.fixture
def handlers(running: RunningServer, tmp_path: Path) -> Handlers:
    return Handlers(running.state, ImageStore(tmp_path / "store"), None)


def send(
    handlers: Handlers, conversation: Conversation, displayed: Any = ()
) -> Coroutine[Any, Any, Any]:
    left = (conversation, list(displayed))
    return handlers.send(QUESTION, False, SessionState(), *left, Conversation(), [])


async def respond(handlers: Handlers, conversation: Conversation) -> list[Any]:
    responses = handlers.respond("tiny", conversation, True, *SETTING_VALUES.values())
    return [outputs async for outputs in responses]


def test_concurrent_requests_for_one_message_generate_one_response(handlers: Handlers) -> None:
    async def respond_twice() -> list[list[Any]]:
        _, conversation, *_ = await send(handlers, Conversation())
        return await asyncio.gather(
            respond(handlers, conversation), respond(handlers, conversation.without_response())
        )

    first, second = asyncio.run(respond_twice())
    assert first[-1][0].messages[-1].status == ""
    assert second == [UNCHANGED * 3]


def test_message_that_is_cleared_while_it_is_read_is_discarded(
    handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_upload = handlers.store.add_upload
    monkeypatch.setattr(
        handlers.store, "add_upload", lambda *a: (time.sleep(0.5), add_upload(*a))[1]
    )
    message = {"text": "Why?", "files": image_files(tmp_path, "red")}
    session = SessionState()

    async def send_and_clear() -> Any:
        reading = asyncio.ensure_future(
            handlers.send(message, False, session, Conversation(), [], Conversation(), [])
        )
        await asyncio.sleep(0.1)
        with pytest.warns(UserWarning, match="still being read"):
            assert handlers.regenerate(session, Conversation(), []) == UNCHANGED * 3
        await handlers.clear(session, Conversation())
        return await reading

    assert asyncio.run(send_and_clear()) == UNCHANGED * 7
    assert not session.is_reading


def test_clear_waits_for_the_last_update_of_a_response(handlers: Handlers) -> None:
    async def clear_while_generating() -> tuple[list[Any], Any]:
        _, conversation, *_ = await send(handlers, Conversation())
        response = handlers.respond("tiny", conversation, True, *SETTING_VALUES.values())
        generating, *_ = await anext(response)
        assert generating.is_generating
        clearing = asyncio.ensure_future(handlers.clear(SessionState(), generating))
        await asyncio.sleep(0.05)
        assert not clearing.done()
        return [outputs async for outputs in response], await clearing

    updates, cleared = asyncio.run(clear_while_generating())
    assert all(outputs == UNCHANGED * 3 for outputs in updates)
    assert cleared[0] == Conversation()


def test_message_is_rejected_if_the_server_lost_the_conversation(handlers: Handlers) -> None:
    with pytest.warns(UserWarning, match="no longer has this conversation"):
        outputs = asyncio.run(send(handlers, Conversation(), displayed=[{"role": "user"}]))
    assert outputs == UNCHANGED * 7


def test_message_is_rejected_while_the_server_drains(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers.state, "draining", True)
    with pytest.warns(UserWarning, match="shutting down"):
        assert asyncio.run(send(handlers, Conversation())) == UNCHANGED * 7


def test_gradio_deletes_no_image_within_the_retention_time(running: RunningServer) -> None:
    async def build() -> tuple[WebUI, gr.Blocks]:
        ui = WebUI(running.state)
        return ui, ui.build()

    ui, blocks = asyncio.run(build())
    image = ui.handlers.store.add_generated(Image.new("RGB", (8, 8), "red"))
    blocks.temp_file_sets[0].add(str(image.path))
    assert blocks.delete_cache is not None
    _, age = blocks.delete_cache
    assert age >= RETENTION_SECONDS
    delete_files_created_by_app(blocks, age)
    assert image.path.exists()


def test_start_deletes_folders_of_killed_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead, live = tmp_path / "medley-ui-dead", tmp_path / "medley-ui-live"
    for folder in (dead, live):
        folder.mkdir()
        (folder / "image.png").write_bytes(b"x")
    with FileLock(live / ".lock"):
        own = private_folder.__wrapped__()
    assert not dead.exists()
    assert (live / "image.png").exists()
    assert own.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in own.iterdir()] == [".lock"]
