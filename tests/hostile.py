"""How long the fuzz, mutation and kill tests run: short, or long with `pytest --hostile`."""

from __future__ import annotations

_FACTOR = 12  # of examples and mutations, in the long form
_is_long = False  # set by conftest before the tests are imported


def set_long(is_long: bool) -> None:
    global _is_long
    _is_long = is_long


def is_long() -> bool:
    return _is_long


def scaled(count: int) -> int:
    """A number of examples, more of them in the long form."""
    return count * _FACTOR if _is_long else count
