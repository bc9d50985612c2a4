"""The `medley` command: using a model."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from medley.options import run_program

# Imported when asked for: a list of commands needs no torch.
COMMANDS = {
    "generate": ("GenerateOptions", "generates text and pictures in any order"),
    "chat": ("ChatOptions", "talks in the terminal, in words and pictures"),
    "answer": ("AnswerOptions", "answers LLaVA's question files"),
    "doctor": ("DoctorOptions", "checks versions, devices and the embedded model"),
}


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items())
        print(f"usage: medley COMMAND [flags]   (medley COMMAND --help lists them)\n\n{listed}")
        return 0 if words else 2
    if words[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        sys.stderr.write(f"medley: no command {words[0]!r}, there is {known}\n")
        return 2
    module: Any = importlib.import_module(f"medley.commands.{words[0]}")
    kind, work = getattr(module, COMMANDS[words[0]][0]), getattr(module, words[0])
    return run_program(f"medley {words[0]}", kind, work, words[1:])


if __name__ == "__main__":
    sys.exit(main())
