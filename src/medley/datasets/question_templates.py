"""Texts of questions about images with labels, from a YAML file that users can replace."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from medley.errors import UserError
from medley.utils.config_files import read_yaml_object

Kind = Literal["one_label", "ordinal", "each_label"]
TEXTS: dict[Kind, tuple[str, ...]] = {
    "one_label": ("question", "answer"),
    "ordinal": ("question", "answer"),
    "each_label": ("question", "positive", "negative", "uncertain"),
}
_REQUIRED = {("one_label", "answer"): "{label}", ("ordinal", "answer"): "{label}",
             ("each_label", "question"): "{label}"}  # fmt: skip
_PLACEHOLDERS = ("{label}", "{choices}", "{dataset}")
_BRACES = re.compile(r"\{\w*\}")
_KEYS = ("names", "datasets")


@dataclass(frozen=True)
class QuestionTemplate:
    """The texts of one kind of question about one dataset.

    Attributes:
        texts: `question`, and `answer` or `positive`, `negative` and `uncertain`
        names: class in the files -> its text
        dataset: name of the dataset
    """

    texts: Mapping[str, str]
    names: Mapping[str, str]
    dataset: str

    def name(self, label: str) -> str:
        return self.names.get(label, label)

    def fill(self, text: str, label: str, choices: Sequence[str] = ()) -> str:
        """One of the texts with its placeholders filled; nothing in them is evaluated."""
        values = {"{label}": self.name(label), "{choices}": join_choices(choices),
                  "{dataset}": self.dataset}  # fmt: skip
        return _BRACES.sub(lambda match: values.get(match[0], match[0]), self.texts[text])


def join_choices(choices: Sequence[str]) -> str:
    """`a, b or c`; with semicolons if a choice contains a comma."""
    separator = "; " if any("," in choice for choice in choices) else ", "
    return " or ".join(filter(None, [separator.join(choices[:-1]), *choices[-1:]]))


def read_template(path: Path | None, kind: Kind, dataset: str) -> QuestionTemplate:
    """The template of a kind of question and a dataset, from the package's file or another one.

    Raises UserError for a file that is missing or not as expected.
    """
    modified = path.stat().st_mtime_ns if path is not None and path.exists() else 0
    return _read_template(path, modified, kind, dataset)


@lru_cache(64)
def _read_template(path: Path | None, modified: int, kind: Kind, dataset: str) -> QuestionTemplate:
    """`modified` makes the cache read a file again that has changed."""
    where, content = _read_file(path)
    own = content["datasets"].get(dataset, {})
    texts = {name: own.get(name, content[kind][name]) for name in TEXTS[kind]}
    for name, text in texts.items():
        _check_text(f"{where}: {name} of {kind}", text, _REQUIRED.get((kind, name)))
    return QuestionTemplate(texts, {**content["names"], **own.get("names", {})}, dataset)


def _read_file(path: Path | None) -> tuple[str, dict[str, Any]]:
    source = path or resources.files("medley") / "datasets" / "questions" / "classification.yaml"
    where = str(path or "classification.yaml")
    with resources.as_file(source) as file:
        content = read_yaml_object(file)
    _check_keys(where, content, (*TEXTS, *_KEYS))
    content = {**dict.fromkeys((*TEXTS, *_KEYS)), **content}
    content = {name: value or {} for name, value in content.items()}
    for kind, names in TEXTS.items():
        _check_keys(f"{where}: {kind}", content[kind], names)
        if missing := [name for name in names if name not in content[kind]]:
            raise UserError(f"{where}: {kind} lacks {', '.join(missing)}.")
    content["names"] = _check_names(where, content["names"])
    _check_keys(where, content["datasets"], None)
    for name, own in content["datasets"].items():
        _check_keys(f"{where}: {name}", own, {*chain(*TEXTS.values()), "names"})
        if "names" in own:
            own["names"] = _check_names(f"{where}: {name}", own["names"] or {})
    return where, content


def _check_keys(where: str, value: Any, allowed: Any) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where}: Expected keys and values (got {value!r}).")
    if allowed is not None and (unknown := [str(key) for key in value if key not in allowed]):
        raise UserError(
            f"{where}: Unknown key {unknown[0]!r} (expected {', '.join(sorted(allowed))})."
        )


def _check_names(where: str, names: Any) -> dict[str, str]:
    """Class -> text; YAML reads an unquoted 0 as a number."""
    _check_keys(f"{where}: names", names, None)
    result = {}
    for label, text in names.items():
        if isinstance(text, bool) or not isinstance(text, str | int) or not str(text).strip():
            raise UserError(
                f"{where}: The name of {label!r} must be a text (got {text!r}). Put it in quotes."
            )
        result[str(label)] = str(text).strip()
    return result


def _check_text(where: str, text: Any, required: str | None) -> None:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} must be a text (got {text!r}). Put it in quotes.")
    if required is not None and required not in text:
        raise UserError(f"{where} lacks {required} (got {text!r}).")
    if unknown := [found for found in _BRACES.findall(text) if found not in _PLACEHOLDERS]:
        raise UserError(
            f"{where} has the unknown placeholder {unknown[0]} (expected "
            f"{', '.join(_PLACEHOLDERS)})."
        )
