"""One parser for all programs: a dataclass of options <- YAML <- flags.

The help of each flag is the line about it under `Args:` in the dataclass's docstring. Unknown
flags and keys are refused; the resolved options are printed before the work begins.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, ArgumentParser

from medley.errors import DataLost, UserError
from medley.utils.distributed import is_main_rank

Options = TypeVar("Options")


class _Parser(ArgumentParser):  # type: ignore[misc]  # jsonargparse is not typed
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line and status 2; argparse would print the whole usage before it."""
        words = " ".join(message.split())
        sys.stderr.write(f"{self.prog}: {words} (--help lists every flag)\n")
        raise SystemExit(2)


def parse(kind: type[Options], prog: str, argv: Sequence[str] | None) -> Options:
    """Flags, and the YAML file that `--config` names, to an instance of a dataclass.

    Exits with status 2 and one line on stderr for anything unknown or unreadable.
    """
    assert dataclasses.is_dataclass(kind)
    docs = parse_docstring(kind.__doc__ or "")
    inherited = [parse_docstring(c.__doc__ or "") for c in reversed(kind.__mro__[:-1])]
    helps = {
        p.arg_name: " ".join((p.description or "").split()) for own in inherited for p in own.params
    }
    parser = _Parser(prog=prog, description=docs.short_description)
    parser.add_argument("--config", action="config", help="a YAML file of options; flags win")
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], f"--{field.name}"
        extra: dict[str, Any] = {"help": helps[field.name]}
        if field.default_factory is not dataclasses.MISSING:
            extra["default"] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            extra["default"] = field.default
        else:
            extra["required"] = True
        if hint is bool:  # --flag, --flag true and --no_flag all work
            parser.add_argument(name, action=ActionYesNo(no_prefix="no_"), nargs="?", **extra)
        elif (element := _element(hint)) is not None:
            parser.add_argument(name, type=element, nargs="+", **extra)
        else:
            parser.add_argument(name, type=hint, **extra)
    words = list(sys.argv[1:] if argv is None else argv)
    values = vars(parser.parse_args(_config_first(words)))
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


def _config_first(words: list[str]) -> list[str]:
    """The parser lets the later of two win; flags shall win wherever the file is named."""
    first: list[str] = []
    rest: list[str] = []
    while words:
        word, *words = words
        if word == "--config" and words:
            first += [word, words.pop(0)]
        else:
            (first if word.startswith("--config=") else rest).append(word)
    return [*first, *rest]


def _element(hint: Any) -> Any:
    """What a list of options holds, for `list[X]` and `list[X] | None`; None for others."""
    for option in (hint, *get_args(hint)):
        if get_origin(option) is list:
            return get_args(option)[0]
    return None


def resolved(options: Any) -> dict[str, Any]:
    """The options as plain values, for printing and for manifests."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return {name: plain(value) for name, value in dataclasses.asdict(options).items()}


def print_resolved(options: Any, prog: str) -> None:
    if is_main_rank() and resolved(options):
        print(f"{prog}: options", flush=True)
        print(yaml.safe_dump(resolved(options), sort_keys=False, allow_unicode=True), flush=True)


def run_program(
    prog: str,
    kind: type[Options],
    work: Callable[[Options], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses, prints the resolved options, works, and turns users' errors into one line.

    Gives the exit status: 0, 2 for bad input, 3 where rows were lost, 130 when stopped by Ctrl-C.
    """
    try:
        options = parse(kind, prog, argv)
        print_resolved(options, prog)
        work(options)
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: stopped\n")
        return 130
    except DataLost as error:
        sys.stderr.write(f"{prog}: {error}\n")
        return 3
    except (UserError, OSError) as error:
        sys.stderr.write(f"{prog}: {error}\n")
        return 2
    return 0
