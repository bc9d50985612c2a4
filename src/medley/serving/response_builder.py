"""Chunks of a response -> the output items and the stream events of `/v1/responses`.

Each run of text is a message item, each image an `image_generation_call` item, in their order.
"""

from __future__ import annotations

import secrets
from typing import Any

from PIL import Image

from medley.serving.image_text import to_markdown
from medley.serving.response_items import IMAGE_CALL
from medley.serving.response_stream import Chunk
from medley.serving.schema import ImagesAs
from medley.utils.html import data_url

Event = dict[str, Any]
_IMAGE = f"response.{IMAGE_CALL}"


def to_base64(image: Image.Image) -> str:
    return data_url(image).partition(",")[2]


class ResponseBuilder:
    """Call `add` with each chunk; `output` has the items so far.

    `head` are the fields of the response object that do not change.
    """

    def __init__(self, head: dict[str, Any], images_as: ImagesAs) -> None:
        self.head, self.images_as = head, images_as
        self.output: list[dict[str, Any]] = []
        self._text: list[str] | None = None  # of the current message item
        self._previews: int | None = None  # of the current image item
        self._events = 0

    # --- the response object --------------------------------------------------------------

    def response(self, status: str, **fields: Any) -> dict[str, Any]:
        output = self.output if status != "in_progress" else []
        return {**self.head, "status": status, "output": output, **fields}

    def begin(self) -> list[Event]:
        response = self.response("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def end(self, status: str, **fields: Any) -> list[Event]:
        """Ends the open item, and the response with `completed` or `incomplete`."""
        events = self._close(status)
        response = self.response(status, **fields)
        return [*events, self._event(f"response.{status}", response=response)]

    def fail(self, detail: dict[str, Any]) -> list[Event]:
        """Ends the open item, and the response with an error."""
        events = self._close("incomplete")
        fields = {name: detail[name] for name in ("code", "message", "param")}
        events.append(self._event("error", **fields))
        error = {"code": detail["code"], "message": detail["message"]}
        response = self.response("failed", error=error)
        return [*events, self._event("response.failed", response=response)]

    # --- items ----------------------------------------------------------------------------

    def add(self, chunk: Chunk) -> list[Event]:
        event = chunk.event
        if event.text:
            return self._add_text(event.text)
        if event.image is not None:
            if self.images_as == "markdown":
                return self._add_text(to_markdown(event.image))
            return self._end_image(event.image)
        if event.progress is not None and self.images_as == "images":
            preview = event.preview if event.progress < 1 else None
            return self._add_progress(preview)
        return []

    def _add_text(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self._text is None:
            self._text = []
            item = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant",
                    "status": "in_progress", "content": []}  # fmt: skip
            self.output.append(item)
            events = [
                self._item_event("response.output_item.added", item=dict(item)),
                self._part_event("response.content_part.added", part=_text_part("")),
            ]
        self._text.append(text)
        return [*events, self._part_event("response.output_text.delta", delta=text, logprobs=[])]

    def _end_text(self, status: str) -> list[Event]:
        text, self._text = "".join(self._text or []), None
        part, item = _text_part(text), self.output[-1]
        item |= {"status": "incomplete" if status == "incomplete" else "completed",
                 "content": [part]}  # fmt: skip
        return [
            self._part_event("response.output_text.done", text=text, logprobs=[]),
            self._part_event("response.content_part.done", part=part),
            self._item_event("response.output_item.done", item=item),
        ]

    def _add_progress(self, preview: Image.Image | None) -> list[Event]:
        events: list[Event] = []
        if self._previews is None:
            events = self._close("completed")
            self._previews = 0
            item = {"id": f"ig_{secrets.token_hex(16)}", "type": IMAGE_CALL, "result": None,
                    "status": "in_progress"}  # fmt: skip
            self.output.append(item)
            events += [
                self._item_event("response.output_item.added", item=dict(item)),
                self._item_event(f"{_IMAGE}.in_progress", item_id=item["id"]),
                self._item_event(f"{_IMAGE}.generating", item_id=item["id"]),
            ]
        if preview is not None:
            fields = {"item_id": self.output[-1]["id"], "partial_image_index": self._previews,
                      "partial_image_b64": to_base64(preview)}  # fmt: skip
            events.append(self._item_event(f"{_IMAGE}.partial_image", **fields))
            self._previews += 1
        return events

    def _end_image(self, image: Image.Image) -> list[Event]:
        events = self._add_progress(None)
        self._previews, item = None, self.output[-1]
        item |= {"status": "completed", "result": to_base64(image),
                 "output_format": "png", "size": f"{image.width}x{image.height}"}  # fmt: skip
        return [
            *events,
            self._item_event(f"{_IMAGE}.completed", item_id=item["id"]),
            self._item_event("response.output_item.done", item=item),
        ]

    def _close(self, status: str) -> list[Event]:
        """Ends the open item. An image that is not complete has no result."""
        if self._text is not None:
            return self._end_text(status)
        if self._previews is None:
            return []
        self._previews = None
        self.output[-1]["status"] = "failed"
        return [self._item_event("response.output_item.done", item=self.output[-1])]

    # --- events ---------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> Event:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **fields}

    def _item_event(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, output_index=len(self.output) - 1, **fields)

    def _part_event(self, kind: str, **fields: Any) -> Event:
        return self._item_event(kind, item_id=self.output[-1]["id"], content_index=0, **fields)


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
