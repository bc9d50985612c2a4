"""What stands where on the page, and what each thing does."""

from __future__ import annotations

import asyncio
import atexit
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import gradio as gr

from medley.errors import UserError
from medley.generation import GenerationOptions
from medley.serving.page import export
from medley.serving.page.asking import answers
from medley.serving.page.examples import Example, phantom_examples
from medley.serving.page.gallery import Gallery
from medley.serving.page.status import Status
from medley.serving.page.talk import Talk, line_of, messages_of, parts_of
from medley.serving.page.votes import Votes
from medley.serving.state import State

_D = GenerationOptions()
SIDES = ("left", "right")
SKIP = (gr.skip(),)  # an output that stays as it is
LAST_WORD = 10.0  # seconds that clearing waits for it
TAKE = """() => setTimeout(() => {
  const file = document.querySelector("#file");
  (file.querySelector("a, button") || file).click();
}, 200)"""
HEAD = f"""<header><h1>Medley</h1><p role="note"><strong>{export.DISCLAIMER}</strong>
Words and pictures from a token model; a drawn picture shows nobody.</p></header>
<p id="gone" role="alert" hidden></p>"""


@dataclass
class Side:
    """One talk on the page: its model, where what was said is shown, a line below it, and the
    talk itself."""

    column: Any
    model: Any
    chat: Any
    line: Any
    talk: Any

    @property
    def shown(self) -> list[Any]:
        return [self.talk, self.chat, self.line]


@cache
def private_folder() -> Path:
    """Where the pages of this process keep pictures, those of Gradio too: nobody else on the
    machine may look into it, and it goes with the process."""
    folder = tempfile.mkdtemp(prefix="medley-page-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


async def _no_address(url_or_file_path: str | Path | None) -> str | None:
    """In the place of what would fetch an address that a request names as its file."""
    if "://" in str(url_or_file_path):
        raise gr.Error("a picture is sent, not named by its address", print_exception=False)
    return None if url_or_file_path is None else str(url_or_file_path)


class Page:
    """Of one server."""

    def __init__(
        self, state: State, votes: Path | None = None, examples: Sequence[Example] = ()
    ) -> None:
        self.state = state
        self.votes = Votes(votes) if votes is not None else None
        self.status = Status(state)
        self.gallery = Gallery(private_folder() / "talks")
        drawn = private_folder() / "examples"
        drawn.mkdir(exist_ok=True)
        self.examples = [*examples, *phantom_examples(drawn)]

    # --- what happens ---------------------------------------------------------------------

    async def take(
        self, message: dict[str, Any], left: Talk, right: Talk, two: bool
    ) -> tuple[Any, ...]:
        """The user's message into the talks on the page; what cannot be taken stays in the box."""
        if under_way(left, right):
            return SKIP * 7
        text, files = message.get("text") or "", message.get("files") or []
        try:
            async with self.state.reading:
                parts = await self.state.in_thread(
                    parts_of, text, files, self.state.limits, self.gallery
                )
        except UserError as error:
            gr.Warning(str(error), title="Not sent", duration=None)
            return SKIP * 7
        other = shown(right.asked(parts)) if two else SKIP * 3
        return ({"text": "", "files": []}, *shown(left.asked(parts)), *other)

    async def answer(
        self, model: str, talk: Talk, on: bool, *values: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """The answer of one side, as it grows."""
        if not (on and talk.waits):
            yield SKIP * 3
            return
        settings = dict(zip(SETTINGS, values, strict=True))
        growing = answers(self.state, self.gallery, model, talk, settings)
        async with aclosing(growing) as talks:
            async for said in talks:
                yield shown(said)

    def again(self, left: Talk, right: Talk, two: bool) -> tuple[Any, ...]:
        if under_way(left, right):
            return SKIP * 6
        return (*shown(left.again()), *(shown(right.again()) if two else SKIP * 3))

    async def stop(self, *talks: Talk) -> None:
        """What there is of the answers under way is kept."""
        for talk in talks:
            if talk.halt is not None:
                talk.halt.wanted.set()

    async def clear(self, *talks: Talk) -> tuple[Any, ...]:
        """Nothing is kept. An answer under way says its last word first, or it would come back."""
        await self.stop(*talks)
        for talk in talks:
            if talk.halt is not None and (talk.waits or talk.under_way):
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(talk.halt.ended.wait(), LAST_WORD)
        return tuple(value for _ in talks for value in shown(Talk()))

    def exported(self, kind: str, two: bool, left: Talk, right: Talk) -> str:
        """The file of what is on the page."""
        talks = [left, right] if two else [left]
        text = export.as_json(talks) if kind == "json" else export.as_html(talks)
        return str(self.gallery.write(f"talk-{time.strftime('%Y%m%d-%H%M%S')}.{kind}", text))

    def vote(self, like: gr.LikeData, talk: Talk) -> None:
        assert self.votes is not None
        index = like.index if isinstance(like.index, int) else like.index[0]
        if not isinstance(like.liked, bool):  # taken back
            return
        self.votes.keep(Talk(talk.said[: index + 1]), like.liked)
        gr.Info("Thank you: the vote is kept.", duration=3)

    # --- where it stands ------------------------------------------------------------------

    def build(self) -> gr.Blocks:
        names = list(self.state.workers)
        with gr.Blocks(
            title="Medley", analytics_enabled=False, fill_width=True, delete_cache=(600, 7200)
        ) as blocks:
            gr.HTML(HEAD)
            settings = self._settings()
            with gr.Row():
                sides = [self._side(names, number) for number in range(2)]
            box = gr.MultimodalTextbox(
                label="Your message", file_count="multiple", max_plain_text_length=100_000,
                placeholder="Ask, or say what to draw. Drop pictures anywhere; <image> says where "
                "one stands in the text.", elem_id="box", lines=1, max_lines=12,
            )  # fmt: skip
            box.async_move_resource_to_block_cache = _no_address  # type: ignore[method-assign]
            with gr.Row(elem_id="actions"):
                stop = gr.Button("Stop", elem_id="stop")
                again = gr.Button("Regenerate", elem_id="again")
                clear = gr.Button("Clear", elem_id="clear")
                two = gr.Checkbox(False, label="Two models side by side", elem_id="two")
                as_page = gr.Button("Save as HTML", elem_id="save-html")
                as_rows = gr.Button("Save as JSON", elem_id="save-json")
                # Gives what it has when it is clicked; it is, once there is something.
                file = gr.DownloadButton("File", elem_id="file", visible="hidden")
            gr.Examples(
                [[{"text": e.text, "files": list(e.files)}] for e in self.examples],
                [box], label="Try one of these", elem_id="examples", cache_examples=False,
            )  # fmt: skip
            gr.HTML('<p class="status"></p>', elem_id="status")  # page.js fills it
            self._wire(
                blocks, sides, settings, box, stop, again, clear, two, as_page, as_rows, file
            )
        return blocks

    def _side(self, names: list[str], number: int) -> Side:
        with gr.Column(visible=number == 0, min_width=300) as column:
            model = gr.Dropdown(
                names, value=names[min(number, len(names) - 1)], label="Model",
                elem_id=f"model-{SIDES[number]}",
            )  # fmt: skip
            chat = gr.Chatbot(
                label="The talk", elem_id=f"chat-{SIDES[number]}", height="50vh",
                render_markdown=False, latex_delimiters=[], buttons=["copy"],
                group_consecutive_messages=False, feedback_options=("Like", "Dislike"),
                placeholder="Ask about a picture, or ask for one.",
            )  # fmt: skip
            line = gr.HTML(line_of(Talk()), elem_id=f"line-{SIDES[number]}")
        return Side(column, model, chat, line, gr.State(Talk()))

    def _settings(self) -> list[Any]:
        with gr.Sidebar(label="How to answer", position="right", open=False):
            return [make(self.state.limits.tokens) for make in SETTINGS.values()]

    def _wire(
        self, blocks: gr.Blocks, sides: list[Side], settings: list[Any], box: Any, stop: Any,
        again: Any, clear: Any, two: Any, as_page: Any, as_rows: Any, file: Any,
    ) -> None:  # fmt: skip
        left, right = sides
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        # Reading a message waits for its turn elsewhere, and a new answer for no other one.
        free: dict[str, Any] = {**quiet, "concurrency_limit": None, "trigger_mode": "multiple"}
        talks, both = [left.talk, right.talk], [*left.shown, *right.shown]
        always = gr.State(True)
        starts = [box.submit(self.take, [box, *talks, two], [box, *both], **free)]
        for again_pressed in (again.click, left.chat.retry, right.chat.retry):
            starts.append(again_pressed(self.again, [*talks, two], both, **free))
        for start in starts:
            for side, on in ((left, always), (right, two)):
                start.success(
                    self.answer, [side.model, side.talk, on, *settings], side.shown, **free
                )
        stop.click(self.stop, talks, None, **free)
        clear.click(self.clear, talks, both, **free)
        for side in sides:
            side.chat.clear(self.clear, side.talk, side.shown, **free)
        two.change(lambda on: gr.update(visible=on), two, right.column, **quiet)
        for button, kind in ((as_page, "html"), (as_rows, "json")):
            made = button.click(partial(self.exported, kind), [two, *talks], file, **quiet)
            made.success(None, js=TAKE, **quiet)
        names = list(self.state.workers)
        blocks.load(
            lambda: [gr.update(choices=names)] * 2, None, [left.model, right.model], **quiet
        )
        if self.votes is not None:
            for side in sides:
                side.chat.like(self.vote, side.talk, None, **quiet)


def shown(talk: Talk) -> tuple[Talk, list[dict[str, Any]], str]:
    """Of a side: the talk, its messages, and the line below them."""
    return talk, messages_of(talk), line_of(talk)


def under_way(*talks: Talk) -> bool:
    """Whether an answer is still being written; the reader is told so."""
    busy = any(talk.under_way for talk in talks)
    if busy:
        gr.Warning("An answer is still being written: wait for it, or press Stop.", title="Not now")
    return busy


def _slider(name: str, label: str, low: float, high: float, step: float) -> Any:
    return lambda _: gr.Slider(low, high, value=getattr(_D, name), step=step, label=label)


# Fields of GenerationOptions in the order of the page, each made for the most tokens of an answer.
SETTINGS: dict[str, Any] = {
    "mode": lambda _: gr.Radio(["any", "text", "image"], value=_D.mode, label="Answer with"),
    "seed": lambda _: gr.Number(-1, label="Seed (-1: another one each time)", precision=0,
                              minimum=-1),
    "min_images": _slider("min_images", "Pictures, at least", 0, 8, 1),
    "max_images": lambda _: gr.Slider(0, 8, 0, step=1, label="Pictures, at most (0: any)"),
    "max_new_tokens": lambda most: gr.Slider(1, most, min(most, _D.max_new_tokens), step=1,
                                             label="Tokens, at most"),
    "text_greedy": lambda _: gr.Checkbox(_D.text_greedy, label="Likeliest word only (greedy)"),
    "text_temperature": _slider("text_temperature", "Temperature of words", 0.05, 2, 0.05),
    "text_top_p": _slider("text_top_p", "Top-p of words", 0.05, 1, 0.05),
    "text_top_k": _slider("text_top_k", "Top-k of words (0: all)", 0, 1000, 1),
    "repetition_penalty": _slider("repetition_penalty", "Repetition penalty", 1, 2, 0.05),
    "guidance_scale_text": _slider("guidance_scale_text", "Guidance by words", 0, 10, 0.1),
    "guidance_scale_image": _slider("guidance_scale_image", "Guidance by pictures", 0, 10, 0.1),
    "image_greedy": lambda _: gr.Checkbox(_D.image_greedy, label="Likeliest code only (greedy)"),
    "image_temperature": _slider("image_temperature", "Temperature of pictures", 0.05, 2, 0.05),
    "image_top_p": _slider("image_top_p", "Top-p of pictures", 0.05, 1, 0.05),
    "image_top_k": _slider("image_top_k", "Top-k of pictures (0: all)", 0, 1000, 1),
}  # fmt: skip
