"""A talk as a file: JSON that can be asked again, or one HTML page with its pictures inside."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from medley.serving.limits import RequestError
from medley.serving.ui.conversation import ChatMessage, Conversation, Shown
from medley.serving.ui.image_store import StoredImage
from medley.version import __version__

DISCLAIMER = "Research only. Not for clinical decisions."
GONE = "[a picture that is not kept any more]"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
article { margin: 1rem 0; padding: .75rem 1rem; border: 1px solid #8886; border-radius: .5rem }
article.user { margin-left: 15% } h2 { font-size: .8rem; margin: 0; opacity: .7 }
p { white-space: pre-wrap; margin: .4rem 0 } img { max-width: 100%; min-width: 8rem } small { opacity: .7 }
@media (prefers-color-scheme: dark) { body { background: #111; color: #eee } }
"""  # noqa: E501


def as_json(talks: Sequence[Conversation]) -> str:
    """Messages of OpenAI's protocol, as the server takes them, and of each answer its model, its
    settings and how it ended. Pictures that were sent are as they were shown."""
    content = {
        "made_by": f"medley {__version__}", "use": DISCLAIMER, "talks": [_told(t) for t in talks],
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False, indent=1)


def _told(talk: Conversation) -> dict[str, Any]:
    said = [one for one in talk.said if one.parts]
    return {
        "messages": [{"role": one.role, "content": list(map(_part, one.parts))} for one in said],
        "answers": [
            {"message": number, "model": one.model, "settings": dict(one.settings),
             "note": one.note}
            for number, one in enumerate(said) if one.role == "assistant"
        ],
    }  # fmt: skip


def _part(part: Shown) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    address = _address(part)
    if address is None:
        return {"type": "text", "text": GONE}
    return {"type": "image_url", "image_url": {"url": address}}


def _address(picture: StoredImage) -> str | None:
    """None for a picture that is not kept any more: the words can still be saved."""
    with suppress(RequestError):
        return picture.address
    return None


def as_html(talks: Sequence[Conversation]) -> str:
    rows = "\n".join(
        "<section>\n" + "\n".join(map(_article, talk.said)) + "\n</section>" for talk in talks
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>A talk</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head><body>
<h1>A talk</h1>
<p>{DISCLAIMER}</p>
{rows}
<small>medley {__version__}</small>
</body></html>
"""


def _shown(part: Shown) -> str:
    address = None if isinstance(part, str) else _address(part)
    if address is not None:
        return f'<p><img alt="Picture of this message" src="{address}"></p>'
    return f"<p>{html.escape(part if isinstance(part, str) else GONE)}</p>"


def _article(said: ChatMessage) -> str:
    who = "You" if said.role == "user" else said.model
    shown = "".join(map(_shown, said.parts))
    told = ", ".join(f"{name} {value}" for name, value in said.settings.items())
    small = "".join(
        f"<small>{html.escape(words)}</small><br>" for words in (said.note, told) if words
    )
    return f'<article class="{said.role}"><h2>{html.escape(who)}</h2>{shown}{small}</article>'
