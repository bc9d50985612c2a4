"""What stands where on the page, and what each thing does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from medley.serving.state import State
from medley.serving.ui.conversation import Conversation, line_of
from medley.serving.ui.examples import Example, phantom_examples
from medley.serving.ui.export import DISCLAIMER
from medley.serving.ui.feedback import FeedbackLog
from medley.serving.ui.handlers import Handlers, SessionState
from medley.serving.ui.image_store import KEPT, ImageStore, private_folder
from medley.serving.ui.settings import SETTINGS
from medley.serving.ui.status import Status

SIDES = ("left", "right")
TAKE = """() => setTimeout(() => {
  const file = document.querySelector("#file");
  (file.querySelector("a, button") || file).click();
}, 200)"""
HEAD = f"""<header><h1>Medley</h1><p role="note"><strong>{DISCLAIMER}</strong>
Words and pictures from a token model; a drawn picture shows nobody.</p></header>
<p id="gone" role="alert" hidden></p>"""


@dataclass
class ChatPanel:
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


class Page:
    """Of one server."""

    def __init__(
        self, state: State, votes: Path | None = None, examples: Sequence[Example] = ()
    ) -> None:
        self.state = state
        self.status = Status(state)
        gallery = ImageStore(private_folder() / "talks")
        self.acts = Handlers(state, gallery, FeedbackLog(votes) if votes is not None else None)
        drawn = private_folder() / "examples"
        drawn.mkdir(exist_ok=True)
        self.examples = [*examples, *phantom_examples(drawn)]

    def build(self) -> gr.Blocks:
        names = list(self.state.workers)
        with gr.Blocks(
            title="Medley", analytics_enabled=False, fill_width=True, delete_cache=(600, int(KEPT))
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
            gr.HTML('<p class="status"></p>', elem_id="status")  # connection.js fills it
            self._wire(
                blocks, sides, settings, box, stop, again, clear, two, as_page, as_rows, file
            )
        return blocks

    def _side(self, names: list[str], number: int) -> ChatPanel:
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
            line = gr.HTML(line_of(Conversation()), elem_id=f"line-{SIDES[number]}")
        return ChatPanel(column, model, chat, line, gr.State(Conversation()))

    def _settings(self) -> list[Any]:
        with gr.Sidebar(label="How to answer", position="right", open=False):
            return [make(self.state.limits.tokens) for make in SETTINGS.values()]

    def _wire(
        self, blocks: gr.Blocks, sides: list[ChatPanel], settings: list[Any], box: Any, stop: Any,
        again: Any, clear: Any, two: Any, as_page: Any, as_rows: Any, file: Any,
    ) -> None:  # fmt: skip
        left, right = sides
        acts = self.acts
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        # They wait for no other one's. An answer may begin while the one before says its last word.
        free: dict[str, Any] = {**quiet, "concurrency_limit": None}
        more: dict[str, Any] = {**free, "trigger_mode": "multiple"}
        desk, always = gr.State(SessionState()), gr.State(True)
        talks, both = [left.talk, right.talk], [*left.shown, *right.shown]
        seen = [desk, left.talk, left.chat, right.talk, right.chat]
        for start, asked in (
            (box.submit(acts.take, [box, two, *seen], [box, *both], **free), sides),
            (again.click(acts.again_both, [two, *seen], both, **free), sides),
            *((side.chat.retry(acts.again, [desk, side.talk, side.chat], side.shown, **free),
               [side]) for side in sides),
        ):  # fmt: skip
            for side in asked:
                inputs = [side.model, side.talk, always if side is left else two, *settings]
                start.success(acts.answer, inputs, side.shown, **more)
        stop.click(acts.stop, talks, None, **more)
        clear.click(acts.clear, [desk, *talks], both, **more)
        for side in sides:
            side.chat.clear(acts.clear, [desk, side.talk], side.shown, **more)
        two.change(lambda on: gr.update(visible=on), two, right.column, **quiet)
        for button, kind in ((as_page, "html"), (as_rows, "json")):
            made = button.click(partial(acts.exported, kind), [two, *talks], file, **quiet)
            made.success(None, js=TAKE, **quiet)
        names = list(self.state.workers)
        blocks.load(
            lambda: [gr.update(choices=names)] * 2, None, [left.model, right.model], **quiet
        )
        if acts.votes is not None:
            for side in sides:
                side.chat.like(acts.vote, side.talk, None, **quiet)
