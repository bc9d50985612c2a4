"""The models of a server: their names, and adapters that share the weights of one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medley.errors import UserError
from medley.inference.loading import resolve, share_base
from medley.inference.model import Model


@dataclass(frozen=True)
class ServedModel:
    """A checkpoint, optionally with an adapter, and the name that requests use."""

    name: str
    ckpt: str
    adapter: Path | None = None


def parse_models(ckpts: Sequence[str], adapters: Sequence[str] = ()) -> list[ServedModel]:
    """`PATH` or `NAME=PATH` of each checkpoint and adapter -> models.

    The default name is the last component of the path. Adapters belong to the first checkpoint.
    Raises UserError if two models have the same name.
    """
    models = [ServedModel(*_parse(text)) for text in ckpts]
    for name, path in map(_parse, adapters):
        models.append(ServedModel(name, models[0].ckpt, Path(path)))
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two models are named {name!r}. Name one of them: NAME=PATH.")
    return models


def _parse(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if equals and "/" not in name:
        return name, path
    return Path(text).name or text, text


def load_models(
    models: Sequence[ServedModel], load_checkpoint: Callable[[str], Model]
) -> dict[str, Model]:
    """Loads the models, by name. Adapters share the weights of the first checkpoint."""
    loaded: dict[str, Model] = {}
    for model in models:
        if model.adapter is None:
            loaded[model.name] = load_checkpoint(model.ckpt)
            continue
        checkpoint, adapter = resolve(model.ckpt, model.adapter, None)
        assert adapter is not None
        loaded[model.name] = share_base(next(iter(loaded.values())), checkpoint, adapter)
    return loaded
