"""`medley evaluate summarize`: a judge's scores, summed up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medley.errors import UserError
from medley.evaluation import judging
from medley.files import write_json
from medley.formats.files import records_of
from medley.formats.sample import RecordError


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
    rows = list(reviews(options.input))
    if options.compat == "llava":
        lines = judging.llava_lines(row for _, row in rows)
        write_json(options.output, {"lines": lines})
        print("\n".join(lines))
        return
    read: list[tuple[dict[str, Any], judging.Pair]] = []
    unread: list[str] = []
    for place, row in rows:
        reply = row.get("gpt_eval", row.get("result"))
        if not isinstance(reply, str):
            raise UserError(f"{place}: no gpt_eval or result, the judge's reply")
        published = options.compat == "llava_med"
        pair = judging.parse_pair_as_llava_med(reply) if published else judging.parse_pair(reply)
        if pair is None:
            unread.append(f"{place}: {reply[:80]!r}")
        else:
            read.append((row, pair))
    groups = judging.by_group(read, "overall")
    scores = {name: summary.published() for name, summary in groups.items()}
    write_json(options.output, {"groups": scores, "replies without two scores": unread})
    print(groups_text(groups))
    if unread:
        print(f"{len(unread)} replies have no two scores, the first: {unread[0]}")


def groups_text(groups: Mapping[str, judging.Summary]) -> str:
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
        yield place, row
