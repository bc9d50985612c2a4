"""Configuration files of unknown origin: one JSON or YAML object, of bounded size and depth.

Libraries build objects from these files, and raise errors of many kinds for wrong values.
`library_errors` turns each of them into one line that names the file.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml

from medley.errors import UserError
from medley.utils.files import refuse_lfs_pointer

MAX_JSON_BYTES = 1 << 26
MAX_YAML_BYTES = 1 << 18  # PyYAML reads about 100 kB a second
MAX_DEPTH = 64
MAX_SIZE = (1 << 31) - 1  # of a dimension, a count or a number of tokens
_REASON = 300  # characters of a library's message

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 80, 80, 40


class _DuplicateKeyError(ValueError):
    """A key with two different values."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, with or without a byte-order mark.

    Raises UserError for a file that is missing, too large, not UTF-8, not JSON, nested too deeply
    or not an object, and for a key with two different values.
    """
    text = _read_text(path, MAX_JSON_BYTES)
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise _too_deep(path) from error
    except ValueError as error:  # also for a number with too many digits
        raise UserError(f"{path}: Invalid JSON ({one_line(error)}).") from error
    return _checked(path, content, "JSON")


def read_yaml_object(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError as `read_json_object` does, and for aliases."""
    text = _read_text(path, MAX_YAML_BYTES)
    try:
        content = yaml.load(text, _PlainLoader)
    except RecursionError as error:
        raise _too_deep(path) from error
    except Exception as error:  # PyYAML's constructors let errors of int and datetime pass
        raise UserError(f"{path}: Invalid YAML ({one_line(error)}).") from error
    return _checked(path, content, "YAML")


def _read_text(path: Path, limit: int) -> str:
    if not path.is_file():
        raise UserError(f"{path}: File not found.")
    size = path.stat().st_size
    if size > limit:
        raise UserError(f"{path}: The file is too large (got {size} bytes, expected {limit}).")
    refuse_lfs_pointer(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: Not UTF-8 ({one_line(error)}). Save it as UTF-8.") from error


def _without_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        for name, value in pairs:
            if content[name] != value:
                raise _DuplicateKeyError(f"{shown(name)} has two different values")
    return content


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases, by which a few lines become billions of values, and duplicate keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        content = super().construct_mapping(node, deep)
        if len(content) < len(node.value):
            _without_duplicates(self.construct_pairs(node, deep=True))
        return content


def _checked(path: Path, content: Any, kind: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{path}: Not a {kind} object (got {shown(content)}). Copy the file again.")
    if not all(isinstance(name, str) for name in content):
        raise UserError(f"{path}: A key is not a string (got {shown(sorted(map(repr, content)))}).")
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, dict | list)
        ]
        if not level:
            return content
    raise _too_deep(path)


def _too_deep(path: Path) -> UserError:
    return UserError(
        f"{path}: Nested too deeply (expected at most {MAX_DEPTH} levels). Copy the file again."
    )


def shown(value: Any) -> str:
    """A value in at most some hundred characters, for messages."""
    return _REPR.repr(value)


def one_line(error: BaseException) -> str:
    """The message of a library's error, in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _REASON else text[: _REASON - 4] + " ..."


@contextmanager
def library_errors(where: str | Path, problem: str, fix: str) -> Iterator[None]:
    """Turns any error of a library in the block into one UserError that names `where`.

    User errors and errors of the operating system pass unchanged.
    """

    def refuse(error: BaseException) -> NoReturn:
        name = type(error).__name__
        reason = f"{name}: {one_line(error)}" if isinstance(error, LookupError) else one_line(error)
        raise UserError(f"{where}: {problem} ({reason}). {fix}") from error

    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        refuse(error)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust; no Exception
            raise
        refuse(error)


def integer(where: str | Path, name: str, value: Any, low: int = 1, high: int = MAX_SIZE) -> int:
    """A field that must be an integer in a range. Raises UserError that names file and field."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(
            f"{where}: Invalid {name} (got {shown(value)}, expected an integer from {low} to "
            f"{high})."
        )
    return value


def number(where: str | Path, name: str, value: Any, low: float = 0.0, high: float = 1e12) -> float:
    """A field that must be a finite number in a range. Raises UserError as `integer` does."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN is in no range
        raise UserError(
            f"{where}: Invalid {name} (got {shown(value)}, expected a number from {low:g} to "
            f"{high:g})."
        )
    return float(value)
