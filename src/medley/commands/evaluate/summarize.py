"""`medley evaluate summarize`: a judge's scores, summed up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medley.commands.model_options import check_output
from medley.datasets.base import RecordError
from medley.datasets.readers import records_of
from medley.errors import UserError
from medley.evaluation import judge_scores
from medley.utils.files import check_unicode, write_json

REPLIES = ("gpt_eval", "result", "content")  # LLaVA-Med v1.5, v1.0, LLaVA


@dataclass(frozen=True)
class SummarizeOptions:
    """Sums up a judge's scores.

    Args:
        input: reviews, JSONL; LLaVA-Med's with the judge's reply in gpt_eval or result, or LLaVA's
            with tuple or score
        output: JSON file of the summaries
        compat: llava_med or llava for the published way to read replies and to sum them up
    """

    input: Path
    output: Path
    compat: Literal["none", "llava_med", "llava"] = "none"


def summarize(options: SummarizeOptions) -> None:
    check_output(options.output, options.input)
    rows = list(reviews(options.input))
    if options.compat == "llava":
        scored = [(p, r) for p, r in rows if r.get("tuple", r.get("score")) is not None]
        lines = judge_scores.llava_lines(row for _, row in scored)
        write_json(options.output, {"lines": lines, "without scores": len(rows) - len(scored)})
        print("\n".join(lines))
        if len(scored) < len(rows):
            print(f"{len(rows) - len(scored)} reviews have no scores")
        return
    if not rows:
        raise UserError(f"{options.input}: no reviews in it")
    read: list[tuple[dict[str, Any], judge_scores.Pair]] = []
    unread: list[str] = []
    for place, row in rows:
        reply = next((row[name] for name in REPLIES if name in row), options)
        if not isinstance(reply, str | None):
            raise UserError(f"{place}: none of {', '.join(REPLIES)}, the judge's reply")
        published = options.compat == "llava_med"
        pair = None
        if reply is not None:
            parse = judge_scores.parse_pair_as_llava_med if published else judge_scores.parse_pair
            pair = parse(reply)
        if pair is None:
            unread.append(f"{place}: {'no reply' if reply is None else repr(reply[:80])}")
        else:
            read.append(({"type": row.get("category"), **row}, pair))
    groups = judge_scores.by_group(read, "overall")
    scores = {name: summary.published() for name, summary in groups.items()}
    write_json(options.output, {"groups": scores, "replies without two scores": unread})
    print(groups_text(groups))
    if unread:
        print(f"{len(unread)} replies have no two scores, the first: {unread[0]}")


def groups_text(groups: Mapping[str, judge_scores.Summary]) -> str:
    lines = [f"{'':24} reference    model   relative      n"]
    lines += [
        f"{name:24} {s.reference:9.2f} {s.model:8.2f} {s.of_ratios:9.1f}% {s.n:6}"
        for name, s in groups.items()
    ]
    return "\n".join(lines)


def reviews(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, _, row in records_of(path):
        if isinstance(row, RecordError):
            raise UserError(f"{place}: {row}")
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected an object")
        check_unicode(place, row)
        yield place, row
