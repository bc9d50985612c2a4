"""Command-line options: a dataclass, filled from a YAML file and from flags.

The help of each flag is its line under `Args:` in the dataclass's docstring. Unknown flags and
keys are errors; the resolved options are printed before the work begins. A deprecated flag stays
usable for one release: the dataclass lists it in `aliases`, and its use prints a warning. A field
whose flag is a reserved word of Python (`from`) has it in the dataclass's `spelling`.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, ArgumentParser

from medley.errors import PartialFailure, UserError
from medley.utils.distributed import is_main_rank
from medley.utils.termination import STATUS as TERMINATED_STATUS
from medley.utils.termination import Terminated, sigterm_as_exception

Options = TypeVar("Options")
RECIPES = "recipes"  # folder of the package with YAML files that `--config NAME` finds


@dataclasses.dataclass(frozen=True)
class Alias:
    """The present spelling of a deprecated flag.

    Attributes:
        flag: present name of the option
        values: present spelling of deprecated values, where they changed as well
        when_set: for a deprecated flag without a value: the value of `flag` that it means
        when_unset: the value of `flag` for its `--no_` form (or `false`)
    """

    flag: str
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    when_set: str | None = None
    when_unset: str | None = None

    def convert(self, value: Any) -> Any:
        """A value of the deprecated option -> value of the present one."""
        if self.when_set is not None:
            return self.when_unset if value in (False, "false", "no") else self.when_set
        return self.values.get(value, value) if isinstance(value, str) else value


class _Parser(ArgumentParser):  # type: ignore[misc]  # jsonargparse is not typed
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line and status 2; argparse would print the whole usage before it."""
        words = " ".join(message.split())
        sys.stderr.write(f"{self.prog}: {words} (--help lists every flag)\n")
        raise SystemExit(2)


def make_parser(kind: type[Any], prog: str) -> ArgumentParser:
    """The parser of a dataclass of options."""
    assert dataclasses.is_dataclass(kind)
    docs = parse_docstring(kind.__doc__ or "")
    inherited = [parse_docstring(c.__doc__ or "") for c in reversed(kind.__mro__[:-1])]
    helps = {
        p.arg_name: " ".join((p.description or "").split()) for own in inherited for p in own.params
    }
    parser = _Parser(prog=prog, description=docs.short_description)
    parser.add_argument(
        "--config", action="config", help="YAML file of options, or a recipe's name; flags win"
    )
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], f"--{_option(kind, field.name)}"
        extra: dict[str, Any] = {"help": helps[field.name]}
        if field.default_factory is not dataclasses.MISSING:
            extra["default"] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            extra["default"] = field.default
        else:
            extra["required"] = True
        if hint in (bool, bool | None):  # --flag, --flag true and --no_flag all work
            parser.add_argument(name, action=ActionYesNo(no_prefix="no_"), nargs="?", **extra)
        elif (element := _element(hint)) is not None:
            parser.add_argument(name, type=element, nargs="+", **extra)
        else:
            parser.add_argument(name, type=hint, **extra)
    return parser


def parse(kind: type[Options], prog: str, argv: Sequence[str] | None) -> Options:
    """Flags, and the YAML file or recipe that `--config` names, to an instance of a dataclass.

    Exits with status 2 and one line on stderr for anything unknown, repeated or unreadable.
    """
    parser = make_parser(kind, prog)
    aliases = aliases_of(kind)
    words = _present_spelling(list(sys.argv[1:] if argv is None else argv), aliases, prog)
    flags = {option for option in parser._option_string_actions if option.startswith("--")}
    _check_flags(words, flags, parser)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    options = {name: _option(kind, name) for name in names}
    values = vars(parser.parse_args(_config_first(words, {*options.values()}, aliases, parser)))
    return kind(**{name: values[option] for name, option in options.items()})


def _option(kind: type[Any], field: str) -> str:
    spelling: dict[str, str] = getattr(kind, "spelling", {})
    return spelling.get(field, field)


def aliases_of(kind: type[Any]) -> dict[str, Alias]:
    """The deprecated flags of a dataclass of options and of its bases."""
    found: dict[str, Alias] = {}
    for base in reversed(kind.__mro__):
        found |= base.__dict__.get("aliases", {})
    return found


def _present_spelling(words: list[str], aliases: Mapping[str, Alias], prog: str) -> list[str]:
    """Replaces deprecated flags and values, with one warning for each."""
    result: list[str] = []
    warned: set[str] = set()
    while words:
        word, *words = words
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--")
        negated = name.startswith("no_") and name not in aliases
        alias = aliases.get(name.removeprefix("no_") if negated else name)
        if alias is None or not flag.startswith("--"):
            result.append(word)
            continue
        given = [value] if equals else list(takewhile(lambda w: not w.startswith("--"), words))
        words = words if equals else words[len(given) :]
        if alias.when_set is not None:
            switch = "false" if negated else (given[0] if given else "true")
            present = [f"--{alias.flag}", str(alias.convert(switch)), *given[1:]]
            old, new = flag, " ".join(present[:2])
        else:
            present = [f"--{'no_' * negated}{alias.flag}", *(str(alias.convert(v)) for v in given)]
            changed = name == alias.flag  # then a value is what is deprecated
            old, new = (
                (" ".join([flag, *given]), " ".join(present)) if changed else (flag, present[0])
            )
        if old != new and old not in warned:
            warned.add(old)
            _warn(prog, f"{old} is deprecated, use {new}")
        result += present
    return result


def _warn(prog: str, message: str) -> None:
    if is_main_rank():
        sys.stderr.write(f"{prog}: warning: {message}\n")


def _check_flags(words: Sequence[str], flags: set[str], parser: ArgumentParser) -> None:
    """Refuses flags that are unknown, abbreviated or given twice."""
    seen: set[str] = set()
    for word in words:
        flag = word.partition("=")[0]
        if not flag.startswith("--") or flag == "--":
            continue
        if flag not in flags and flag.partition(".")[0] not in flags:
            likely = [known for known in sorted(flags) if known.startswith(flag)]
            likely = likely or difflib.get_close_matches(flag.replace("-", "_"), flags, 1, 0.7)
            likely = likely or difflib.get_close_matches(flag, flags, 1, 0.7)
            hint = f"; did you mean {' or '.join(likely[:3])}?" if likely else ""
            parser.error(f"unknown flag {flag}{hint}")
        one = flag.replace("--no_", "--", 1) if flag.replace("--no_", "--", 1) in flags else flag
        if one in seen:
            parser.error(
                f"{flag} is given twice; give it once (a flag that takes several values takes "
                "them all behind one flag)"
            )
        seen.add(one)


def _config_first(
    words: list[str], names: set[str], aliases: Mapping[str, Alias], parser: ArgumentParser
) -> list[str]:
    """Moves `--config` to the front, since flags override it wherever it is given.

    Its file is read here: recipes are found by name, and deprecated keys are converted.
    """
    first: list[str] = []
    rest: list[str] = []
    while words:
        word, *words = words
        if word == "--config" and words:
            first = ["--config", _read_config(words.pop(0), names, aliases, parser)]
        elif word.startswith("--config="):
            value = word.partition("=")[2]
            first = ["--config", _read_config(value, names, aliases, parser)]
        else:
            rest.append(word)
    return [*first, *rest]


def _read_config(
    name: str, names: set[str], aliases: Mapping[str, Alias], parser: ArgumentParser
) -> str:
    """The present options of a YAML file or recipe, as YAML."""
    try:
        content = yaml.safe_load(find_config(name).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {name}: cannot be read: {error}")
    except UserError as error:
        parser.error(str(error))
    if not isinstance(content, dict):
        parser.error(f"--config {name}: expected a mapping of options to values")
    found: dict[str, Any] = {}
    for key, value in content.items():
        alias = aliases.get(str(key))
        present = alias.flag if alias else str(key)
        if present not in names:
            likely = difflib.get_close_matches(present, names, 1)
            hint = f"; did you mean {likely[0]}?" if likely else ""
            parser.error(f"--config {name}: unknown option {key!r}{hint}")
        if present in found:
            parser.error(f"--config {name}: two keys set {present!r}, {key!r} is one of them")
        if alias is not None and (key != present or alias.convert(value) != value):
            _warn(parser.prog, f"{name}: {key!r} is deprecated, use {present!r}")
        found[present] = value if alias is None else alias.convert(value)
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def find_config(name: str) -> Path:
    """A YAML file by its path, or a recipe of the package by its name.

    Raises UserError that lists the recipes, where there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(resources.files("medley") / RECIPES))
    recipes = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name in recipes:
        return recipes[name]
    raise UserError(
        f"--config {name}: no such file, and no recipe of that name (recipes: {', '.join(recipes)})"
    )


def _element(hint: Any) -> Any:
    """The type of a list's elements, for `list[X]` and `list[X] | None`; None for other types."""
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
    """Parses, prints the resolved options, works, and turns user errors into one line.

    Returns the exit status: 0; 2 for bad input; 3 if some records or requests failed; 130 after
    Ctrl-C; 143 after SIGTERM.
    """
    try:
        with sigterm_as_exception(prog):
            options = parse(kind, prog, argv)
            print_resolved(options, prog)
            work(options)
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        return 130
    except Terminated:
        sys.stderr.write(f"{prog}: terminated\n")
        return TERMINATED_STATUS
    except PartialFailure as error:
        sys.stderr.write(f"{prog}: {error}\n")
        return 3
    except (UserError, OSError) as error:
        sys.stderr.write(f"{prog}: {error}\n")
        return 2
    return 0
