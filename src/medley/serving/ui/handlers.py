"""What happens on the page: a message is taken, answered, asked again, stopped, cleared, saved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import gradio as gr

from medley.errors import UserError
from medley.serving.state import State
from medley.serving.ui import export
from medley.serving.ui.conversation import Conversation, line_of, messages_of, parts_of
from medley.serving.ui.feedback import FeedbackLog
from medley.serving.ui.generate import answers
from medley.serving.ui.image_store import ImageStore
from medley.serving.ui.settings import SETTINGS

SKIP = (gr.skip(),)  # an output that stays as it is
LAST_WORD = 10.0  # seconds that clearing waits for it
Chat = list[dict[str, Any]]  # the messages that a browser shows


@dataclass
class SessionState:
    """Of one browser: whether a message is being read, and how often it was cleared."""

    reading: bool = False
    era: int = 0


@dataclass
class Handlers:
    """Of one server. Talks go in and out; a side's outputs are those of `shown`."""

    state: State
    gallery: ImageStore
    votes: FeedbackLog | None

    async def take(
        self, message: dict[str, Any], two: bool, desk: SessionState, left: Conversation, left_chat: Chat,
        right: Conversation, right_chat: Chat,
    ) -> tuple[Any, ...]:  # fmt: skip
        """The user's message into the talks on the page; what cannot be taken stays in the box."""
        if self._refused(desk, (left, left_chat), *[(right, right_chat)] * two):
            return SKIP * 7
        text, files = message.get("text") or "", message.get("files") or []
        desk.reading, era = True, desk.era
        try:
            async with self.state.reading if files else nullcontext():
                parts = await self.state.in_thread(
                    parts_of, text, files, self.state.limits, self.gallery
                )
        except UserError as error:
            gr.Warning(str(error), title="Not sent", duration=None)
            return SKIP * 7
        finally:
            desk.reading = False
        if desk.era != era:  # cleared meanwhile: the talks are other ones now
            return SKIP * 7
        other = shown(right.asked(parts)) if two else SKIP * 3
        return ({"text": "", "files": []}, *shown(left.asked(parts)), *other)

    async def answer(
        self, model: str, talk: Conversation, on: bool, *values: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """The answer of one side, as it grows. There is one for each question."""
        if not (on and talk.waits) or talk.halt is None or talk.halt.taken:
            yield SKIP * 3
            return
        settings = dict(zip(SETTINGS, values, strict=True))
        growing = answers(self.state, self.gallery, model, talk, settings)
        async with aclosing(growing) as talks:
            async for said in talks:
                yield SKIP * 3 if talk.halt.forgotten else shown(said)

    def again(self, desk: SessionState, talk: Conversation, chat: Chat) -> tuple[Any, ...]:
        """One side without its last answer, which is asked for anew."""
        return SKIP * 3 if self._refused(desk, (talk, chat)) else shown(talk.again())

    def again_both(
        self,
        two: bool,
        desk: SessionState,
        left: Conversation,
        left_chat: Chat,
        right: Conversation,
        right_chat: Chat,
    ) -> tuple[Any, ...]:
        if self._refused(desk, (left, left_chat), *[(right, right_chat)] * two):
            return SKIP * 6
        return (*shown(left.again()), *(shown(right.again()) if two else SKIP * 3))

    async def stop(self, *talks: Conversation) -> None:
        """What there is of the answers under way is kept."""
        for talk in talks:
            if talk.halt is not None:
                talk.halt.wanted.set()

    async def clear(self, desk: SessionState, *talks: Conversation) -> tuple[Any, ...]:
        """Nothing is kept. An answer under way says its last word first, or it would come back."""
        desk.era += 1
        for talk in talks:
            if talk.halt is not None:
                talk.halt.forgotten = True
        await self.stop(*talks)
        for talk in talks:
            if talk.halt is not None and talk.halt.taken:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(talk.halt.ended.wait(), LAST_WORD)
        return tuple(value for _ in talks for value in shown(Conversation()))

    def exported(self, kind: str, two: bool, left: Conversation, right: Conversation) -> str:
        """The file of what is on the page."""
        talks = [left, right] if two else [left]
        text = export.as_json(talks) if kind == "json" else export.as_html(talks)
        return str(self.gallery.write(f"talk-{time.strftime('%Y%m%d-%H%M%S')}.{kind}", text))

    def vote(self, like: gr.LikeData, talk: Conversation) -> None:
        assert self.votes is not None
        index = like.index if isinstance(like.index, int) else like.index[0]
        if not isinstance(like.liked, bool):  # taken back
            return
        try:
            self.votes.keep(Conversation(talk.said[: index + 1]), like.liked)
        except UserError as error:
            gr.Warning(str(error), title="The vote is not kept", duration=None)
            return
        gr.Info("Thank you: the vote is kept.", duration=3)

    def _refused(self, desk: SessionState, *sides: tuple[Conversation, Chat]) -> bool:
        """Whether nothing new can be asked now; the reader is told why."""
        reason = ""
        if self.state.draining:
            reason = "The server is shutting down, and takes nothing new."
        elif desk.reading:
            reason = "Your message is still being read."
        elif any(talk.under_way for talk, _ in sides):
            reason = "An answer is still being written: wait for it, or press Stop."
        elif any(chat and not talk.said for talk, chat in sides):
            reason = (
                "The server has forgotten this talk, and would answer without it. Copy what you "
                "need, then press Clear."
            )
        if reason:
            gr.Warning(reason, title="Not now", duration=None)
        return bool(reason)


def shown(talk: Conversation) -> tuple[Conversation, Chat, str]:
    """Of a side: the talk, its messages, and the line below them."""
    return talk, messages_of(talk), line_of(talk)
