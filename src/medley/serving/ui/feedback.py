"""Feedback about responses, in the format of LLaVA's front end: one JSON Lines file a day."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from medley.data.vocabulary import IMAGE
from medley.serving.ui.conversation import Conversation
from medley.serving.ui.image_store import StoredImage
from medley.utils.files import atomic_file
from medley.utils.jsonl import append_jsonl


@dataclass
class FeedbackLog:
    """Writes `YYYY-MM-DD-conv.json` in `folder`, and each image once below `serve_images/`."""

    folder: Path
    lock: threading.Lock = field(default_factory=threading.Lock)

    def append(self, conversation: Conversation, is_positive: bool) -> Path:
        """Appends feedback about the last response of a conversation. Returns the file."""
        response = conversation.messages[-1]
        now = time.time()
        day = time.strftime("%Y-%m-%d", time.localtime(now))
        images: list[str] = []
        messages = []
        for message in conversation.messages:
            text = ""
            for part in message.parts:
                if isinstance(part, StoredImage):
                    images.append(self._save_image(part.display_image, day))
                    text += IMAGE
                else:
                    text += part
            messages.append([message.role, text])
        row = {
            "tstamp": round(now, 4), "type": "upvote" if is_positive else "downvote",
            "model": response.model,
            "state": {"roles": ["user", "assistant"], "messages": messages, "images": images,
                      "settings": dict(response.settings)}, "ip": None,
        }  # fmt: skip
        path = self.folder / f"{day}-conv.json"
        with self.lock:
            append_jsonl(path, row)
        return path

    def _save_image(self, image: Image.Image, day: str) -> str:
        """Saves an image under LLaVA's name for it, an MD5. Returns the path below `folder`."""
        digest = hashlib.md5(image.tobytes(), usedforsecurity=False).hexdigest()
        name = f"serve_images/{day}/{digest}.jpg"
        path = self.folder / name
        if not path.exists():
            with atomic_file(path) as temporary:
                image.save(temporary, "JPEG", quality=95)
        return name
