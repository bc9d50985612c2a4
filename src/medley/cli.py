"""The `medley` command: its verbs by stage, and the one entry point that runs each of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from typing import Any

from medley.version import __version__


@dataclass(frozen=True)
class Verb:
    """One verb: its module in `medley.commands`, dataclass of options, function, one line of help.

    The module is imported when the verb runs, so that `medley --help` needs no torch.
    """

    module: str
    options: str
    function: str
    help: str


STAGES: dict[str, dict[str, Verb]] = {
    "Data": {
        "convert": Verb(
            "convert", "ConvertOptions", "convert", "convert datasets to documents, and back"
        ),
        "fetch-figures": Verb(
            "fetch_figures", "FetchFiguresOptions", "fetch_figures",
            "download LLaVA-Med's figures and data files",
        ),
        "generate-instructions": Verb(
            "generate_instructions", "GenerateInstructionsOptions", "generate_instructions",
            "have a chat model write conversations from captions, or translate documents",
        ),
        "clean-instructions": Verb(
            "clean_instructions", "CleanInstructionsOptions", "clean_instructions",
            "clean generated conversations into an instruction file",
        ),
        "draw-phantoms": Verb(
            "draw_phantoms", "DrawPhantomsOptions", "draw_phantoms",
            "generate synthetic scans with documents and questions",
        ),
    },
    "Tokenization": {
        "tokenize-images": Verb(
            "tokenize_images", "TokenizeImagesOptions", "tokenize_images",
            "encode images to image codes, on any number of ranks",
        ),
        "tokenize": Verb(
            "tokenize", "TokenizeOptions", "tokenize", "encode documents to token sequences"
        ),
        "validate": Verb(
            "validate", "ValidateOptions", "validate", "check documents or token sequences"
        ),
        "reconstruction-report": Verb(
            "reconstruction_report", "ReconstructionReportOptions", "reconstruction_report",
            "measure how well a VQGAN reconstructs your images",
        ),
        "finetune-vqgan": Verb(
            "finetune_vqgan", "FinetuneVqganOptions", "finetune_vqgan",
            "fine-tune a VQGAN on your images",
        ),
    },
    "Training": {
        "train": Verb(
            "train", "TrainOptions", "train", "train the decoder: LoRA, image head or all weights"
        ),
    },
    "Conversion": {
        "merge": Verb("merge", "MergeOptions", "merge", "merge a LoRA adapter into its base"),
        "to-pth": Verb(
            "to_pth", "ToPthOptions", "to_pth", "Hugging Face's layout to Chameleon's .pth layout"
        ),
        "to-hf": Verb(
            "to_hf", "ToHfOptions", "to_hf", "Chameleon's .pth layout to Hugging Face's layout"
        ),
        "make-delta": Verb(
            "make_delta", "MakeDeltaOptions", "make_delta", "subtract a base from a model"
        ),
        "apply-delta": Verb(
            "apply_delta", "ApplyDeltaOptions", "apply_delta", "add a delta to its base"
        ),
    },
    "Inference": {
        "generate": Verb(
            "generate", "GenerateOptions", "generate", "generate text and images from prompts"
        ),
        "chat": Verb("chat", "ChatOptions", "chat", "chat in the terminal, with images"),
        "answer": Verb(
            "answer", "AnswerOptions", "answer", "answer a file of questions about images"
        ),
        "serve": Verb(
            "serve", "ServeOptions", "serve", "serve models by OpenAI's protocol, and a web UI"
        ),
    },
    "Evaluation": {
        "evaluate vqa": Verb(
            "evaluate.vqa", "VqaOptions", "vqa", "score answers to visual questions"
        ),
        "evaluate classification": Verb(
            "evaluate.classification", "ClassificationOptions", "classification",
            "score answers with choices: accuracy, AUROC, calibration, thresholds",
        ),
        "evaluate science-qa": Verb(
            "evaluate.science_qa", "ScienceQaOptions", "score_science_qa",
            "score answers to ScienceQA",
        ),
        "evaluate science-qa-judge": Verb(
            "evaluate.science_qa", "AdjudicateOptions", "adjudicate",
            "have a judge decide between two ScienceQA answer files",
        ),
        "evaluate gpt-review": Verb(
            "evaluate.gpt_review", "ReviewOptions", "review",
            "have a judge score pairs of answers",
        ),
        "evaluate summarize": Verb(
            "evaluate.summarize", "SummarizeOptions", "summarize", "summarize a judge's scores"
        ),
        "evaluate medmax": Verb(
            "evaluate.medmax", "MedmaxOptions", "medmax", "answer and score MedMax's suite"
        ),
        "evaluate report": Verb(
            "evaluate.report", "ReportOptions", "report", "compare two runs: report A B"
        ),
    },
    "Installation": {
        "doctor": Verb(
            "doctor", "DoctorOptions", "doctor",
            "check versions, devices and the embedded model",
        ),
    },
}  # fmt: skip
VERBS = {name: verb for verbs in STAGES.values() for name, verb in verbs.items()}
# Names that MedMax users know for the same verbs.
SYNONYMS = {
    "image-tokenization": "tokenize-images", "tokenize-jsonl": "tokenize", "merge-lora": "merge",
    "bin-to-pth": "to-pth", "hf-to-chameleon": "to-pth", "pth-to-bin": "to-hf",
    "chameleon-to-hf": "to-hf", "convert-dataset": "convert",
}  # fmt: skip
SHELLS = ("bash", "zsh", "tcsh")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `medley VERB flags`. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"medley {__version__}")
        return 0
    if words[0] == "--completion":
        return print_completion(words[1:])
    words[0] = SYNONYMS.get(words[0], words[0])
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in VERBS), None)
    if name is None:
        return _unknown(words)
    flags = words[len(name.split()) :]
    if name == "evaluate report":  # its two runs may be given without their flag
        runs = list(takewhile(lambda word: not word.startswith("-"), flags))
        flags = [*(["--runs", *runs] if runs else []), *flags[len(runs) :]]
    return run_verb(name, flags)


def run_verb(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs one verb with its flags (those of the process unless given). Returns the exit status.

    `prog` is the name in messages: that of a stage's program, or `medley VERB`.
    """
    from medley.utils.cli_options import run_program  # imports the parser, a quarter of a second

    verb = VERBS[name]
    module = load(verb)
    words = list(sys.argv[1:] if argv is None else argv)
    # Distributed launchers append it; the environment has the same number.
    words = [word for word in words if not word.startswith(("--local_rank", "--local-rank"))]
    kind, work = getattr(module, verb.options), getattr(module, verb.function)
    return run_program(prog or f"medley {name}", kind, work, words)


def load(verb: Verb) -> Any:
    """Imports the module of a verb."""
    return importlib.import_module(f"medley.commands.{verb.module}")


def usage() -> str:
    lines = ["usage: medley VERB [flags]   (medley VERB --help lists the flags of a verb)"]
    for stage, verbs in STAGES.items():
        lines += ["", f"{stage}:"]
        lines += [f"  {name:26} {verb.help}" for name, verb in verbs.items()]
    lines += [
        "",
        "On several GPUs: torchrun --nproc-per-node=N -m medley VERB [flags]",
        "Shell completion: medley --completion bash (or zsh, tcsh). Version: medley --version",
    ]
    return "\n".join(lines)


def _unknown(words: Sequence[str]) -> int:
    given = " ".join(words[: 2 if words[0] == "evaluate" else 1])
    likely = get_close_matches(given, [*VERBS, *SYNONYMS], 1)
    hint = f"Did you mean {likely[0]!r}?" if likely else f"Verbs: {', '.join(VERBS)}."
    sys.stderr.write(f"medley: unknown verb {given!r}. {hint}\n")
    return 2


def print_completion(words: Sequence[str]) -> int:
    """Prints a completion script for a shell, made by shtab from the parsers of all verbs."""
    if len(words) != 1 or words[0] not in SHELLS:
        sys.stderr.write(f"medley: --completion needs one of {', '.join(SHELLS)}\n")
        return 2
    import argparse

    import shtab

    from medley.utils.cli_options import make_parser

    parser = argparse.ArgumentParser("medley")
    groups: dict[str, Any] = {"": parser.add_subparsers()}
    for name, verb in VERBS.items():
        first, _, second = name.rpartition(" ")
        if first not in groups:
            groups[first] = groups[""].add_parser(first).add_subparsers()
        own = groups[first].add_parser(second, help=verb.help)
        options = make_parser(getattr(load(verb), verb.options), f"medley {name}")
        for flag in options._option_string_actions:
            if flag not in ("-h", "--help"):
                own.add_argument(flag)
    print(shtab.complete(parser, shell=words[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
