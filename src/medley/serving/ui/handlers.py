"""Event handlers of the web UI: send, regenerate, stop, clear, export, feedback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import gradio as gr

from medley.errors import UserError
from medley.serving.state import ServerState
from medley.serving.ui import export
from medley.serving.ui.conversation import (
    ChatbotMessage,
    Conversation,
    chatbot_messages,
    note_html,
    parse_message,
)
from medley.serving.ui.feedback import FeedbackLog
from medley.serving.ui.generate import generate_response
from medley.serving.ui.image_store import ImageStore
from medley.serving.ui.settings import SETTINGS

UNCHANGED = (gr.skip(),)  # an output that keeps its value
FINISH_SECONDS = 10.0  # maximum wait for a cancelled response
Displayed = list[ChatbotMessage]  # the messages that a browser displays
Outputs = tuple[Any, ...]  # values of Gradio components


@dataclass
class SessionState:
    """State of one browser: whether a message is being read, and how often it was cleared."""

    is_reading: bool = False
    clear_count: int = 0


@dataclass
class Handlers:
    """Handlers of one server. The outputs of a panel are those of `panel_outputs`."""

    state: ServerState
    store: ImageStore
    feedback: FeedbackLog | None

    async def send(
        self,
        message: dict[str, Any],
        both: bool,
        session: SessionState,
        left: Conversation,
        left_displayed: Displayed,
        right: Conversation,
        right_displayed: Displayed,
    ) -> Outputs:
        """Appends the user's message to the conversations. A rejected message stays in its box."""
        right_panel = [(right, right_displayed)] * both
        if self._is_blocked(session, (left, left_displayed), *right_panel):
            return UNCHANGED * 7
        text, files = message.get("text") or "", message.get("files") or []
        session.is_reading, clear_count = True, session.clear_count
        try:
            async with self.state.decode_slots if files else nullcontext():
                parts = await asyncio.to_thread(
                    parse_message, text, files, self.state.limits, self.store
                )
        except UserError as error:
            gr.Warning(str(error), title="Message not sent", duration=None)
            return UNCHANGED * 7
        finally:
            session.is_reading = False
        if session.clear_count != clear_count:  # `left` and `right` are outdated.
            return UNCHANGED * 7
        right_outputs = panel_outputs(right.with_user_message(parts)) if both else UNCHANGED * 3
        left_outputs = panel_outputs(left.with_user_message(parts))
        return ({"text": "", "files": []}, *left_outputs, *right_outputs)

    async def respond(
        self, model: str, conversation: Conversation, is_enabled: bool, *settings: Any
    ) -> AsyncGenerator[Outputs, None]:
        """Yields the outputs of a panel while its response grows; one response for each message."""
        cancel = conversation.cancel
        if not is_enabled or not conversation.needs_response or cancel is None or cancel.started:
            yield UNCHANGED * 3
            return
        values = dict(zip(SETTINGS, settings, strict=True))
        response = generate_response(self.state, self.store, model, conversation, values)
        async with aclosing(response) as updates:
            async for update in updates:
                yield UNCHANGED * 3 if cancel.discard else panel_outputs(update)

    def regenerate(
        self, session: SessionState, conversation: Conversation, displayed: Displayed
    ) -> Outputs:
        """Removes the last response of one panel; `respond` generates another one."""
        if self._is_blocked(session, (conversation, displayed)):
            return UNCHANGED * 3
        return panel_outputs(conversation.without_response())

    def regenerate_both(
        self,
        both: bool,
        session: SessionState,
        left: Conversation,
        left_displayed: Displayed,
        right: Conversation,
        right_displayed: Displayed,
    ) -> Outputs:
        right_panel = [(right, right_displayed)] * both
        if self._is_blocked(session, (left, left_displayed), *right_panel):
            return UNCHANGED * 6
        right_outputs = panel_outputs(right.without_response()) if both else UNCHANGED * 3
        return (*panel_outputs(left.without_response()), *right_outputs)

    async def stop(self, *conversations: Conversation) -> None:
        """Stops the running responses; what was generated stays."""
        for conversation in conversations:
            if conversation.cancel is not None:
                conversation.cancel.requested.set()

    async def clear(self, session: SessionState, *conversations: Conversation) -> Outputs:
        """Empties the conversations.

        Waits for a running response to finish, so that its last update cannot repopulate the
        cleared conversation.
        """
        session.clear_count += 1
        for conversation in conversations:
            if conversation.cancel is not None:
                conversation.cancel.discard = True
        await self.stop(*conversations)
        for conversation in conversations:
            if conversation.cancel is not None and conversation.cancel.started:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(conversation.cancel.finished.wait(), FINISH_SECONDS)
        return tuple(value for _ in conversations for value in panel_outputs(Conversation()))

    def export(self, kind: str, both: bool, left: Conversation, right: Conversation) -> str:
        """Writes the conversations to a file; the path."""
        conversations = [left, right] if both else [left]
        text = export.to_json(conversations) if kind == "json" else export.to_html(conversations)
        name = f"conversation-{time.strftime('%Y%m%d-%H%M%S')}.{kind}"
        return str(self.store.write_text(name, text))

    def record_feedback(self, like: gr.LikeData, conversation: Conversation) -> None:
        assert self.feedback is not None
        index = like.index if isinstance(like.index, int) else like.index[0]
        if not isinstance(like.liked, bool):  # The user withdrew the feedback.
            return
        try:
            self.feedback.append(Conversation(conversation.messages[: index + 1]), like.liked)
        except UserError as error:
            gr.Warning(str(error), title="Feedback not saved", duration=None)
            return
        gr.Info("Thank you. The feedback was saved.", duration=3)

    def _is_blocked(self, session: SessionState, *panels: tuple[Conversation, Displayed]) -> bool:
        """Whether nothing can be sent at present; displays the reason."""
        reason = ""
        if self.state.draining:
            reason = "The server is shutting down. It accepts no new messages."
        elif session.is_reading:
            reason = "The previous message is still being read."
        elif any(conversation.is_generating for conversation, _ in panels):
            reason = "A response is still being generated. Wait for it, or press Stop."
        elif any(displayed and not conversation.messages for conversation, displayed in panels):
            reason = (
                "The server no longer has this conversation, so a response would ignore it. Copy "
                "what you need, then press Clear."
            )
        if reason:
            gr.Warning(reason, title="Not now", duration=None)
        return bool(reason)


def panel_outputs(conversation: Conversation) -> tuple[Conversation, Displayed, str]:
    """The outputs of a panel: the conversation, its messages, and the line below them."""
    return conversation, chatbot_messages(conversation), note_html(conversation)
