"""What the results of a run depend on, so that a resumed run continues only its own work.

A run records its identity (in its manifest or a JSON file) before it writes a result. The next
run with the same output compares its own identity with the recorded one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from medley.errors import UserError
from medley.utils.cli_options import resolved
from medley.utils.files import path_hash


def run_identity(
    options: Any, ignored: Collection[str] = (), **inputs: Path | None
) -> dict[str, Any]:
    """The resolved options without those that do not change results, and a hash of each input.

    `inputs` name files or folders; NAME is recorded as `NAME_hash`.
    """
    kept = {name: value for name, value in resolved(options).items() if name not in ignored}
    hashes = {f"{name}_hash": path_hash(path) for name, path in inputs.items() if path is not None}
    return kept | hashes


def check_same_run(
    recorded: Mapping[str, Any],
    current: Mapping[str, Any],
    output: Path,
    advice: str = "name another --output",
    ignored: Collection[str] = (),
) -> None:
    """Raises UserError that names the differing fields, where `output` belongs to another run."""
    names = sorted({*recorded, *current} - set(ignored))
    differing = [
        f"{name} was {recorded.get(name)!r}, now {current.get(name)!r}"
        for name in names
        if recorded.get(name) != current.get(name)
    ]
    if differing:
        raise UserError(
            f"{output}: contains results of a run with other options ({'; '.join(differing)}). "
            f"Use the same options, or {advice}."
        )
