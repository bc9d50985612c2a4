"""A talk as a file: JSON that can be asked again, or one HTML page with its pictures inside."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from medley.serving.page.talk import Said, Talk
from medley.serving.pictures import data_address
from medley.version import __version__

DISCLAIMER = "Research only. Not for clinical decisions."
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
article { margin: 1rem 0; padding: .75rem 1rem; border: 1px solid #8886; border-radius: .5rem }
article.user { margin-left: 15% } h2 { font-size: .8rem; margin: 0; opacity: .7 }
p { white-space: pre-wrap; margin: .4rem 0 } img { max-width: 100%; min-width: 8rem } small { opacity: .7 }
@media (prefers-color-scheme: dark) { body { background: #111; color: #eee } }
"""  # noqa: E501


Talks = Sequence[tuple[str, Talk]]  # by the names of their models


def as_json(talks: Talks, settings: Mapping[str, Any]) -> str:
    """Messages of OpenAI's protocol, as the server takes them, with their model and settings."""
    told = [
        {"model": model, "messages": [
            {"role": said.role, "content": [_part(part) for part in said.parts]}
            for said in talk.said
        ], "notes": [said.note for said in talk.said]}
        for model, talk in talks
    ]  # fmt: skip
    content = {
        "made_by": f"medley {__version__}", "use": DISCLAIMER, "settings": dict(settings),
        "talks": told,
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False, indent=1)


def _part(part: str | Image.Image) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": data_address(part)}}


def as_html(talks: Talks, settings: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"<h1>A talk with {html.escape(model)}</h1>\n" + "\n".join(map(_article, talk.said))
        for model, talk in talks
    )
    told = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>A talk</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head><body>
<p>{DISCLAIMER}</p>
{rows}
<small>medley {__version__}; {html.escape(told)}</small>
</body></html>
"""


def _article(said: Said) -> str:
    who = "You" if said.role == "user" else said.model
    shown = "".join(
        f"<p>{html.escape(part)}</p>" if isinstance(part, str)
        else f'<p><img alt="Picture of this message" src="{data_address(part)}"></p>'
        for part in said.parts
    )  # fmt: skip
    note = f"<small>{html.escape(said.note)}</small>" if said.note else ""
    return f'<article class="{said.role}"><h2>{html.escape(who)}</h2>{shown}{note}</article>'
