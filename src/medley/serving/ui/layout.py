"""Layout of the web UI, and the handlers of its events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from medley.serving.state import ServerState
from medley.serving.ui.conversation import Conversation, note_html
from medley.serving.ui.examples import Example, phantom_examples
from medley.serving.ui.export import DISCLAIMER
from medley.serving.ui.feedback import FeedbackLog
from medley.serving.ui.handlers import Handlers, SessionState
from medley.serving.ui.image_store import EXAMPLES, RETENTION_SECONDS, ImageStore, private_folder
from medley.serving.ui.settings import SETTINGS
from medley.serving.ui.status import ServerStatus

SIDES = ("left", "right")
CLEANUP_INTERVAL = 600  # seconds between two deletions of Gradio's files
# Clicks the link of the exported file once Gradio has updated it.
DOWNLOAD_JS = """() => setTimeout(() => {
  const file = document.querySelector("#file");
  (file.querySelector("a, button") || file).click();
}, 200)"""
HEADER = f"""<header><h1>Medley</h1><p role="note"><strong>{DISCLAIMER}</strong>
Generated images do not show real patients.</p></header>
<p id="alert" role="alert" hidden></p>"""


@dataclass
class ChatPanel:
    """One conversation: its model, its messages, the line below them, and its state."""

    column: gr.Column
    model: gr.Dropdown
    chatbot: gr.Chatbot
    note: gr.HTML
    conversation: gr.State

    @property
    def outputs(self) -> list[Component]:
        return [self.conversation, self.chatbot, self.note]


@dataclass
class Controls:
    """The message box, and the buttons below it."""

    message: gr.MultimodalTextbox
    stop: gr.Button
    regenerate: gr.Button
    clear: gr.Button
    both: gr.Checkbox
    save_html: gr.Button
    save_json: gr.Button
    file: gr.DownloadButton


class WebUI:
    """The web UI of one server."""

    def __init__(
        self,
        state: ServerState,
        feedback_dir: Path | None = None,
        examples: Sequence[Example] = (),
    ) -> None:
        self.state = state
        self.status = ServerStatus(state)
        obey_exif = all(
            worker.model.image_tokenizer.preprocessing.exif_orientation
            for worker in state.workers.values()
        )
        store = ImageStore(private_folder() / "conversations", obey_exif, state.limits)
        feedback = FeedbackLog(feedback_dir) if feedback_dir is not None else None
        self.handlers = Handlers(state, store, feedback)
        example_folder = private_folder() / EXAMPLES
        example_folder.mkdir(exist_ok=True)
        self.examples = [*examples, *phantom_examples(example_folder)]

    def build(self) -> gr.Blocks:
        with gr.Blocks(
            title="Medley", analytics_enabled=False, fill_width=True,
            delete_cache=(CLEANUP_INTERVAL, int(RETENTION_SECONDS)),
        ) as blocks:  # fmt: skip
            gr.HTML(HEADER)
            with gr.Sidebar(label="Generation settings", position="right", open=False):
                settings = [make(self.state.limits.max_tokens) for make in SETTINGS.values()]
            with gr.Row():
                panels = [self._make_panel(number) for number in range(len(SIDES))]
            controls = self._make_controls()
            gr.Examples(
                [[{"text": e.text, "files": list(e.files)}] for e in self.examples],
                [controls.message], label="Examples", elem_id="examples", cache_examples=False,
            )  # fmt: skip
            gr.HTML('<p class="status"></p>', elem_id="server-status")  # filled by connection.js
            self._connect(blocks, panels, settings, controls)
        return blocks

    def _make_panel(self, number: int) -> ChatPanel:
        names, side = list(self.state.workers), SIDES[number]
        with gr.Column(visible=number == 0, min_width=300) as column:
            model = gr.Dropdown(
                names, value=names[min(number, len(names) - 1)], label="Model",
                elem_id=f"model-{side}",
            )  # fmt: skip
            chatbot = gr.Chatbot(
                label="Conversation", elem_id=f"chat-{side}", height="50vh",
                render_markdown=False, latex_delimiters=[], buttons=["copy"],
                group_consecutive_messages=False, feedback_options=("Like", "Dislike"),
                placeholder="Ask about an image, or ask for one.",
            )  # fmt: skip
            note = gr.HTML(note_html(Conversation()), elem_id=f"note-{side}")
        return ChatPanel(column, model, chatbot, note, gr.State(Conversation()))

    def _make_controls(self) -> Controls:
        message = gr.MultimodalTextbox(
            label="Your message", file_count="multiple", max_plain_text_length=100_000,
            placeholder="Ask a question, or describe an image to generate. Drop images here; "
            "<image> in the text sets the position of an image.",
            elem_id="message", lines=1, max_lines=12,
        )  # fmt: skip
        with gr.Row(elem_id="actions"):
            return Controls(
                message,
                stop=gr.Button("Stop", elem_id="stop"),
                regenerate=gr.Button("Regenerate", elem_id="regenerate"),
                clear=gr.Button("Clear", elem_id="clear"),
                both=gr.Checkbox(False, label="Compare two models", elem_id="both"),
                save_html=gr.Button("Save as HTML", elem_id="save-html"),
                save_json=gr.Button("Save as JSON", elem_id="save-json"),
                # A download button needs its file before the click: the others write it first.
                file=gr.DownloadButton("File", elem_id="file", visible="hidden"),
            )

    def _connect(
        self,
        blocks: gr.Blocks,
        panels: Sequence[ChatPanel],
        settings: Sequence[Component],
        controls: Controls,
    ) -> None:
        left, right = panels
        handlers, both = self.handlers, controls.both
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        # Handlers that do not wait for those of other browsers.
        concurrent: dict[str, Any] = {**quiet, "concurrency_limit": None}
        # Handlers that may start while the same one of this browser runs: a response may begin
        # while the previous one sends its last update.
        multiple: dict[str, Any] = {**concurrent, "trigger_mode": "multiple"}
        session, always = gr.State(SessionState()), gr.State(True)
        conversations = [left.conversation, right.conversation]
        outputs = [*left.outputs, *right.outputs]
        inputs = [session, left.conversation, left.chatbot, right.conversation, right.chatbot]

        sent = controls.message.submit(
            handlers.send, [controls.message, both, *inputs], [controls.message, *outputs],
            **concurrent,
        )  # fmt: skip
        regenerated = controls.regenerate.click(
            handlers.regenerate_both, [both, *inputs], outputs, **concurrent
        )
        retried = [
            panel.chatbot.retry(
                handlers.regenerate, [session, panel.conversation, panel.chatbot], panel.outputs,
                **concurrent,
            )
            for panel in panels
        ]  # fmt: skip
        for panel, retry in zip(panels, retried, strict=True):
            is_enabled = always if panel is left else both
            for event in (sent, regenerated, retry):
                event.success(
                    handlers.respond, [panel.model, panel.conversation, is_enabled, *settings],
                    panel.outputs, **multiple,
                )  # fmt: skip
            panel.chatbot.clear(
                handlers.clear, [session, panel.conversation], panel.outputs, **multiple
            )
            if handlers.feedback is not None:
                panel.chatbot.like(handlers.record_feedback, panel.conversation, None, **quiet)
        controls.stop.click(handlers.stop, conversations, None, **multiple)
        controls.clear.click(handlers.clear, [session, *conversations], outputs, **multiple)
        both.change(lambda visible: gr.update(visible=visible), both, right.column, **quiet)
        for button, kind in ((controls.save_html, "html"), (controls.save_json, "json")):
            exported = button.click(
                partial(handlers.export, kind), [both, *conversations], controls.file, **quiet
            )
            exported.success(None, js=DOWNLOAD_JS, **quiet)
        names = list(self.state.workers)
        blocks.load(
            lambda: [gr.update(choices=names)] * 2, None, [left.model, right.model], **quiet
        )
