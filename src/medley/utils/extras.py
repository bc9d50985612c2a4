"""Optional dependencies: named, with the command that installs them, before any data is read."""

from __future__ import annotations

import importlib.util

from medley.errors import UserError


def require_extra(module: str, extra: str, reason: str) -> None:
    """Raises UserError where a module of an extra is not installed.

    `reason` is what needs it: a verb, or a flag.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"{reason} needs {module}, which is not installed: pip install 'medley-mm[{extra}]'"
        )
