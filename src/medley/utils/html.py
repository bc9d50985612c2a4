"""HTML files: Jinja2 templates (medley/templates) with one style sheet, and images as data URLs."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from PIL import Image

from medley.version import __version__


def render(template: str, title: str, **values: Any) -> str:
    """One self-contained HTML file from a template that extends `base.html`.

    Values are escaped. A value that the template uses and that is missing raises UndefinedError.
    """
    return _environment().get_template(template).render(title=title, **values)


@lru_cache(1)
def _environment() -> Environment:
    folder = resources.files("medley") / "templates"

    def source(name: str) -> str:
        return (folder / name).read_text("utf-8")

    environment = Environment(
        loader=FunctionLoader(source), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"style": source("style.css"), "version": __version__}
    return environment


def data_url(image: Image.Image, longest: int | None = None) -> str:
    """An image inside of an HTML file: JPEG at most `longest` pixels wide and high, else PNG."""
    buffer = io.BytesIO()
    if longest is None:
        image.save(buffer, "png")
        kind = "png"
    else:
        image = image.convert("RGB")
        image.thumbnail((longest, longest))
        image.save(buffer, "jpeg", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
