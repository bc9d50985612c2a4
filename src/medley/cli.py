"""The `medley` command: using a model."""

from __future__ import annotations

import importlib
import sys
from itertools import takewhile
from typing import Any

from medley.utils.cli_options import run_program

# Module, options and function of each; imported when asked for: a list of commands needs no torch.
COMMANDS = {
    "generate": ("generate", "GenerateOptions", "generate", "generates text and pictures"),
    "chat": ("chat", "ChatOptions", "chat", "talks in the terminal, in words and pictures"),
    "answer": ("answer", "AnswerOptions", "answer", "answers LLaVA's question files"),
    "evaluate vqa": ("evaluate.vqa", "VqaOptions", "vqa", "scores answers to visual questions"),
    "evaluate science-qa": (
        "evaluate.science_qa", "ScienceQaOptions", "score_science_qa",
        "scores answers to ScienceQA",
    ),
    "evaluate science-qa-judge": (
        "evaluate.science_qa", "SettleOptions", "settle",
        "has a judge settle two answer files to ScienceQA",
    ),
    "evaluate gpt-review": (
        "evaluate.review", "ReviewOptions", "review", "has a judge score answers side by side",
    ),
    "evaluate summarize": (
        "evaluate.summarize", "SummarizeOptions", "summarize", "sums up a judge's scores",
    ),
    "evaluate medmax": (
        "evaluate.medmax", "MedmaxOptions", "medmax", "answers and scores MedMax's suite",
    ),
    "evaluate report": (
        "evaluate.compare", "CompareOptions", "compare", "compares two runs: report A B",
    ),
    "serve": ("serve", "ServeOptions", "serve", "serves models to existing clients"),
    "doctor": ("doctor", "DoctorOptions", "doctor", "checks versions, devices, the embedded model"),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:26} {text}" for name, (*_, text) in COMMANDS.items())
        print(f"usage: medley COMMAND [flags]   (medley COMMAND --help lists them)\n\n{listed}")
        return 0 if words else 2
    size = 2 if " ".join(words[:2]) in COMMANDS else 1
    name = " ".join(words[:size])
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        said = " ".join(words[: 2 if words[0] == "evaluate" else 1])
        sys.stderr.write(f"medley: no command {said!r}, there is {known}\n")
        return 2
    place, kind, work, _ = COMMANDS[name]
    module: Any = importlib.import_module(f"medley.commands.{place}")
    flags = words[size:]
    if name == "evaluate report":  # its two runs may stand without their flag
        runs = list(takewhile(lambda word: not word.startswith("-"), flags))
        flags = [*(["--runs", *runs] if runs else []), *flags[len(runs) :]]
    return run_program(f"medley {name}", getattr(module, kind), getattr(module, work), flags)


if __name__ == "__main__":
    sys.exit(main())
