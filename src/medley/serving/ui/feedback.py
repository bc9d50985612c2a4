"""Votes about answers, as LLaVA's front end keeps them: a line of JSON in a file of the day."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from medley.data.vocabulary import IMAGE
from medley.serving.ui.conversation import Conversation
from medley.serving.ui.image_store import StoredImage
from medley.utils.jsonl import append_jsonl


@dataclass
class FeedbackLog:
    """Kept in `folder`: `YYYY-MM-DD-conv.json`, and each picture once below `serve_images/`."""

    folder: Path
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, talk: Conversation, liked: bool) -> Path:
        """Appends a vote about the last answer of a talk; gives the file."""
        voted = talk.said[-1]
        now = time.time()
        day = time.strftime("%Y-%m-%d", time.localtime(now))
        images: list[str] = []
        messages = []
        for said in talk.said:
            words = ""
            for part in said.parts:
                if isinstance(part, StoredImage):
                    images.append(self._image(part, day))
                    words += IMAGE
                else:
                    words += part
            messages.append([said.role, words])
        row = {
            "tstamp": round(now, 4), "type": "upvote" if liked else "downvote",
            "model": voted.model,
            "state": {"roles": ["user", "assistant"], "messages": messages, "images": images,
                      "settings": dict(voted.settings)}, "ip": None,
        }  # fmt: skip
        path = self.folder / f"{day}-conv.json"
        with self.lock:
            append_jsonl(path, row)
        return path

    def _image(self, kept: StoredImage, day: str) -> str:
        """Its name below the folder. The MD5 is LLaVA's way to name, and guards nothing."""
        image = kept.image
        digest = hashlib.md5(image.tobytes(), usedforsecurity=False).hexdigest()
        name = f"serve_images/{day}/{digest}.jpg"
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=95)
            path.write_bytes(buffer.getvalue())
        return name
