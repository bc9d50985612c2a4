"""`medley evaluate summarize`: summarizes the scores in a file of reviews."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medley.commands.model_options import check_output
from medley.errors import UserError
from medley.evaluation import judge_scores
from medley.evaluation.records import LocatedRecord, read_objects
from medley.utils.files import write_json


@dataclass(frozen=True)
class SummarizeOptions:
    """Summarizes a judge's scores.

    Args:
        input: JSONL file of reviews, with the judge's reply in gpt_eval or result (LLaVA-Med) or
            content (LLaVA), or else with its scores in tuple or score (LLaVA)
        output: JSON file of the summaries
        compat: llava_med or llava reproduces the published parser and summary
    """

    input: Path
    output: Path
    compat: Literal["none", "llava_med", "llava"] = "none"


def summarize(options: SummarizeOptions) -> None:
    check_output(options.output, options.input)
    reviews = list(read_objects(options.input))
    if options.compat == "llava":
        summarize_as_llava(options, reviews)
        return
    if not reviews:
        raise UserError(f"{options.input}: The file contains no reviews.")
    parsed, unparsed = judge_scores.parse_reviews(reviews, options.compat == "llava_med")
    groups = judge_scores.summarize_groups(parsed, "overall")
    scores = {name: summary.to_llava_med() for name, summary in groups.items()}
    write_json(options.output, {"groups": scores, "replies without two scores": unparsed})
    print(judge_scores.format_groups(groups))
    if unparsed:
        print(f"{len(unparsed)} replies do not contain two scores; the first: {unparsed[0]}")


def summarize_as_llava(options: SummarizeOptions, reviews: list[LocatedRecord]) -> None:
    scored = [row for _, row in reviews if row.get("tuple", row.get("score")) is not None]
    lines = judge_scores.llava_table(scored)
    unscored = len(reviews) - len(scored)
    write_json(options.output, {"lines": lines, "without scores": unscored})
    print("\n".join(lines))
    if unscored:
        print(f"{unscored} reviews have no scores")
