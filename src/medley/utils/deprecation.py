"""Deprecated names of the public API: still usable for one release, with a DeprecationWarning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class DeprecatedName:
    """A class attribute that forwards the old name of a method or attribute to the new one.

    class Model:
        encode = DeprecatedName("encode_document")
    """

    def __init__(self, new_name: str) -> None:
        self.new_name = new_name

    def __set_name__(self, owner: type, name: str) -> None:
        self.old_name = f"{owner.__name__}.{name}"

    def __get__(self, instance: object, owner: type) -> Any:
        _warn(self.old_name, f"{owner.__name__}.{self.new_name}")
        return getattr(owner if instance is None else instance, self.new_name)


def renamed_keywords(**new_names: str) -> Callable[[Function], Function]:
    """A decorator that accepts old keyword names: `@renamed_keywords(old="new")`."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            for old_name, new_name in new_names.items():
                if old_name in keywords:
                    _warn(f"{function.__name__}({old_name}=)", f"{new_name}=")
                    keywords[new_name] = keywords.pop(old_name)
            return function(*arguments, **keywords)

        return wrapper  # type: ignore[return-value]  # the same signature

    return decorate


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is deprecated. Use {new}.", DeprecationWarning, stacklevel=3)
