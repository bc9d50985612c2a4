"""Prompts and HTML report of `training/pipeline.sh`.

    python -m training.pipeline_report prompts --data DIR --output DIR
    python -m training.pipeline_report report --data DIR --output DIR --before tiny --after CKPT

`prompts` reads test.jsonl of the data and writes prompts-image.jsonl, prompts-text.jsonl and
prompts-any.jsonl for `medley generate`. `report` reads the responses, answers the held-out
questions with both checkpoints, and writes index.html and scores.json. The code is in
`training/demo/`.
"""

import sys

from medley.utils.cli_options import run_program
from training.demo.prompts import PromptOptions, write_prompts
from training.demo.report import ReportOptions, write_report

PROGRAM = "training.pipeline_report"


def main(argv: list[str] | None = None) -> int:
    command, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if command == "prompts":
        return run_program(PROGRAM, PromptOptions, write_prompts, flags)
    if command == "report":
        return run_program(PROGRAM, ReportOptions, write_report, flags)
    sys.stderr.write(f"{PROGRAM}: Expected `prompts` or `report` as the first argument.\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
